//! Lists of work for the tiled attention kernels: which rows of which sequence or segment a block takes, longest first.

/// One tile: (sequence or segment, first row within it).
type Tile = [i32; 2];

/// Tiles of `tile_rows` rows of a causal batch, rows packed `group` to a query row, sequences of one row left out if `skip_single`.
/// What a tile costs is the keys that its last row sees.
pub(super) fn causal(
    query_start: &[u32],
    context: &[u32],
    group: usize,
    tile_rows: usize,
    skip_single: bool,
) -> Vec<Tile> {
    let mut tiles: Vec<(usize, Tile)> = Vec::new();
    for (sequence, (pair, context)) in query_start.windows(2).zip(context).enumerate() {
        let rows = (pair[1] - pair[0]) as usize;
        if rows == 1 && skip_single {
            continue;
        }
        let unseen = (*context as usize).saturating_sub(rows);
        for first in (0..rows * group).step_by(tile_rows) {
            let last_row = (first + tile_rows).min(rows * group).div_ceil(group);
            tiles.push((unseen + last_row, [sequence as i32, first as i32]));
        }
    }
    tiles.sort_by_key(|(cost, _)| std::cmp::Reverse(*cost));
    tiles.into_iter().map(|(_, tile)| tile).collect()
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
        let tiles = causal(&[0, 1, 41, 61], &[11, 40, 120], 4, 64, true);
        assert_eq!(tiles, [[2, 64], [2, 0], [1, 128], [1, 64], [1, 0]]);
        assert_eq!(causal(&[0, 1], &[11], 4, 128, false), [[0, 0]]);
        assert_eq!(segments(&[0, 1, 1, 130], 64), [[2, 0], [2, 64], [2, 128], [0, 0]]);
        assert_eq!(segments(&[0, 1, 1, 130], 128), [[2, 0], [2, 128], [0, 0]]);
    }
}
