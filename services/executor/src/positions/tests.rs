//! Expected values: transformers 5.17's `get_rope_index` (models.md §4.4; the goldens hold more).

use super::*;
use millrace_protocol::{ActorId, PageDtype, PageRef};

fn item(start: u32, grid_h: u32, grid_w: u32) -> MediaItem {
    let node = ActorId::new("p").unwrap();
    let patches = PageRef { node, page: 1, dtype: PageDtype::F32, shape: vec![], bytes: 0, hash: [0; 16] };
    MediaItem { start, tokens: grid_h * grid_w / 4, grid_h, grid_w, patches, normalise: None }
}

fn axis(positions: &Positions, tokens: u32, axis: usize) -> Vec<u32> {
    (0..tokens).map(|n| positions.of(n)[axis]).collect()
}

#[test]
fn an_image_spreads_over_height_and_width_and_uses_up_its_longer_side() {
    let positions = Positions::with_media(&[item(4, 4, 6)], 2);
    assert_eq!(axis(&positions, 13, 0), [0, 1, 2, 3, 4, 4, 4, 4, 4, 4, 7, 8, 9]);
    assert_eq!(axis(&positions, 13, 1), [0, 1, 2, 3, 4, 4, 4, 5, 5, 5, 7, 8, 9]);
    assert_eq!(axis(&positions, 13, 2), [0, 1, 2, 3, 4, 5, 6, 4, 5, 6, 7, 8, 9]);
    assert_eq!(positions.delta(), -3);
    assert_eq!(positions.of(20), [17; 3]);
}

#[test]
fn items_that_touch_follow_each_other_without_text_between() {
    let positions = Positions::with_media(&[item(0, 4, 4), item(4, 2, 2), item(5, 2, 8)], 2);
    assert_eq!(axis(&positions, 10, 0), [0, 0, 0, 0, 2, 3, 3, 3, 3, 7]);
    assert_eq!(axis(&positions, 10, 1), [0, 0, 1, 1, 2, 3, 3, 3, 3, 7]);
    assert_eq!(axis(&positions, 10, 2), [0, 1, 0, 1, 2, 3, 4, 5, 6, 7]);
    assert_eq!(positions.delta(), -2);
}

#[test]
fn text_between_two_items_is_shifted_by_the_first_alone() {
    let positions = Positions::with_media(&[item(1, 6, 2), item(6, 2, 4)], 2);
    assert_eq!(axis(&positions, 10, 0), [0, 1, 1, 1, 4, 5, 6, 6, 8, 9]);
    assert_eq!(positions.delta(), 0);
}

#[test]
fn text_stands_on_the_diagonal() {
    assert_eq!(Positions::text().of(41), [41; 3]);
    assert_eq!(Positions::with_media(&[], 2), Positions::text());
}
