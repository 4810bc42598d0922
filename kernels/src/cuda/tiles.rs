//! Lists of work for the tiled attention kernels: which rows of which sequence or segment a block takes, longest first.

/// One tile: (sequence or segment, first row within it).
type Tile = [i32; 2];

/// Keys of a step of the tiled kernels on Hopper: tiles of as many steps cost the same.
const STEP_KEYS: usize = 128;

/// How the tiles of a causal batch are cut.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cut {
    /// Query heads of a kv head: packed rows of a query row.
    pub group: usize,
    /// Packed rows of a tile.
    pub tile_rows: usize,
    /// Whether sequences of one row are left out.
    pub skip_single: bool,
    /// Tokens whose keys and values stay in the L2 while several tiles read them.
    pub window_tokens: usize,
}

/// Tiles of a causal batch. What a tile costs is the steps over the keys that its last row sees. Longest first, for blocks that take
/// one after another; but sequences are worked through in windows that the L2 holds, since every tile reads its sequence's keys.
pub(super) fn causal(query_start: &[u32], context: &[u32], cut: Cut) -> Vec<Tile> {
    let Cut { group, tile_rows, skip_single, window_tokens } = cut;
    let mut tiles: Vec<(usize, usize, Tile)> = Vec::new();
    let (mut window, mut tokens) = (0, 0);
    for (sequence, (pair, context)) in query_start.windows(2).zip(context).enumerate() {
        let (rows, context) = ((pair[1] - pair[0]) as usize, *context as usize);
        if rows == 1 && skip_single {
            continue;
        }
        if tokens > 0 && tokens + context > window_tokens {
            (window, tokens) = (window + 1, 0);
        }
        tokens += context;
        let unseen = context.saturating_sub(rows);
        for first in (0..rows * group).step_by(tile_rows) {
            let last_row = (first + tile_rows).min(rows * group).div_ceil(group);
            tiles.push((window, (unseen + last_row).div_ceil(STEP_KEYS), [sequence as i32, first as i32]));
        }
    }
    tiles.sort_by_key(|(window, cost, _)| (*window, std::cmp::Reverse(*cost)));
    tiles.into_iter().map(|(_, _, tile)| tile).collect()
}

/// Tiles of `tile_rows` rows of segments whose rows all see each other.
pub(super) fn segments(start: &[u32], tile_rows: usize) -> Vec<Tile> {
    let mut tiles: Vec<(usize, Tile)> = Vec::new();
    for (segment, pair) in start.windows(2).enumerate() {
        let rows = (pair[1] - pair[0]) as usize;
        tiles.extend((0..rows).step_by(tile_rows).map(|first| (rows, [segment as i32, first as i32])));
    }
    tiles.sort_by_key(|(cost, _)| std::cmp::Reverse(*cost));
    tiles.into_iter().map(|(_, tile)| tile).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_cover_every_packed_row_longest_first() {
        // 1 row behind 10, 40 rows behind none, 20 rows behind 100; four heads to a row.
        let cut = Cut { group: 4, tile_rows: 64, skip_single: true, window_tokens: 1000 };
        let tiles = causal(&[0, 1, 41, 61], &[11, 40, 120], cut);
        assert_eq!(tiles, [[1, 0], [1, 64], [1, 128], [2, 0], [2, 64]]);
        // 300 rows: tiles whose last rows see up to 128, 256 and 300 keys.
        let tiles = causal(&[0, 300, 301], &[300, 200], Cut { group: 1, tile_rows: 128, ..cut });
        assert_eq!(tiles, [[0, 256], [0, 128], [0, 0]]);
        let one = Cut { group: 4, tile_rows: 128, skip_single: false, window_tokens: 1 };
        assert_eq!(causal(&[0, 1], &[11], one), [[0, 0]]);
        assert_eq!(segments(&[0, 1, 1, 130], 64), [[2, 0], [2, 64], [2, 128], [0, 0]]);
        assert_eq!(segments(&[0, 1, 1, 130], 128), [[2, 0], [2, 128], [0, 0]]);
    }

    #[test]
    fn sequences_come_in_windows_that_the_cache_holds() {
        // Of 128, 256, 256 and 128 tokens, two and two fit.
        let cut = Cut { group: 1, tile_rows: 128, skip_single: false, window_tokens: 400 };
        let tiles = causal(&[0, 128, 384, 640, 768], &[128, 256, 256, 128], cut);
        assert_eq!(tiles, [[1, 128], [0, 0], [1, 0], [2, 128], [2, 0], [3, 0]]);
        let whole = causal(&[0, 128, 384, 640, 768], &[128, 256, 256, 128], Cut { window_tokens: 10_000, ..cut });
        assert_eq!(whole, [[1, 128], [2, 128], [0, 0], [1, 0], [2, 0], [3, 0]]);
    }
}
