//! The attention of a few query rows over one head's pages: softmax(scale q k) v.
//!
//! Keys are taken in chunks of whole pages counted from token 0, with a running maximum; a row's sums run in token order. So a
//! row's result depends on its own keys and the page size, not on the rows it is computed with nor on where pages lie. Scores and
//! sums are f32; with bf16 the unnormalised probabilities are rounded before they meet the values, their sum is not.

use crate::kv_cache::{PageLayout, TILE, pack_word};
use crate::norm::tree_sum;
use crate::simd::math::exp;
use crate::simd::{self, Isa, Kernel, LANES, Lanes, Vectors};

/// Tokens of one chunk, if pages are not longer.
const CHUNK_TOKENS: usize = 512;

/// Query rows that share one pass over the keys.
pub(crate) const ROWS: usize = 16;

/// One head's pages and the rows that look at them.
pub(crate) struct Attend<'a, E> {
    pub(crate) layout: PageLayout,
    /// Keys and values of each page in token order.
    pub(crate) pages: &'a [(&'a [u32], &'a [u32])],
    /// Rows of `key_dim` elements.
    pub(crate) queries: &'a [E],
    /// Tokens that each row sees, from token 0; at least one.
    pub(crate) visible: &'a [usize],
    pub(crate) scale: f32,
    /// Rows of `value_dim` elements.
    pub(crate) out: &'a mut [E],
}

/// Computes `attend.out`.
pub(crate) fn attend<E: Vectors>(isa: Isa, attend: Attend<'_, E>) {
    let Attend { layout, pages, queries, visible, .. } = &attend;
    let longest = visible.iter().copied().max().unwrap_or(0);
    assert!(queries.len() == visible.len() * layout.key_dim && attend.out.len() == visible.len() * layout.value_dim);
    assert!(visible.iter().all(|&tokens| tokens > 0) && pages.len() * layout.block_tokens >= longest);
    assert!(
        pages.iter().all(|(keys, values)| {
            keys.len() == layout.key_page_words() && values.len() == layout.value_page_words()
        })
    );
    simd::run(isa, attend);
}

impl<E: Vectors> Kernel<E> for Attend<'_, E> {
    #[inline(always)]
    unsafe fn call<L: Lanes<Element = E>>(self) {
        let rows = self.visible.len();
        let page_slots = self.layout.block_tokens.next_multiple_of(TILE);
        let chunk_pages = (CHUNK_TOKENS / page_slots).max(1);
        let width = self.layout.value_row_words();
        let mut work = Work {
            queries: pack_rows(self.queries, self.layout.key_dim),
            depth: self.layout.key_depth(),
            scores: vec![0.0; rows * chunk_pages * page_slots],
            weights: vec![E::default(); rows * chunk_pages * page_slots],
            slots: chunk_pages * page_slots,
            sums: vec![0.0; rows * width],
            width,
        };
        let mut max = vec![f32::NEG_INFINITY; rows];
        let mut total = vec![0f32; rows];
        let longest = self.visible.iter().copied().max().unwrap_or(0);
        let page_count = longest.div_ceil(self.layout.block_tokens);
        let mut tiles = Vec::new();
        for first_page in (0..page_count).step_by(chunk_pages) {
            let pages = first_page..page_count.min(first_page + chunk_pages);
            tiles.clear();
            for page in pages.clone() {
                let tokens = self.tokens_in(page, longest);
                for tile in 0..tokens.div_ceil(TILE) {
                    let keys = &self.pages[page].0[tile * self.layout.key_tile_words()..];
                    tiles.push((keys.as_ptr(), (page - first_page) * page_slots + tile * TILE));
                }
            }
            // SAFETY: same contract; every tile has `key_tile_words` words and its slots lie inside a row of scores.
            unsafe { work.score::<L>(rows, &tiles) };
            for row in 0..rows {
                self.softmax(&mut work, row, pages.clone(), page_slots, &mut max[row], &mut total[row]);
            }
            // SAFETY: same contract; pages hold the tokens that the rows see.
            unsafe { self.add_values::<L>(&mut work, pages, page_slots) };
        }
        for (row, out) in self.out.chunks_exact_mut(self.layout.value_dim).enumerate() {
            for (out, sum) in out.iter_mut().zip(&work.sums[row * width..]) {
                *out = E::narrow(sum / total[row]);
            }
        }
    }
}

/// Scratch of one call.
struct Work<E> {
    /// Query rows as words, `depth` to a row.
    queries: Vec<u32>,
    depth: usize,
    /// Scores, `slots` to a row; a page takes whole tiles of slots.
    scores: Vec<f32>,
    /// Unnormalised probabilities, as `scores`.
    weights: Vec<E>,
    slots: usize,
    /// Weighted sums of values, `width` to a row.
    sums: Vec<f32>,
    width: usize,
}

/// Rows of elements as rows of words, an odd end padded with zero.
fn pack_rows<E: Vectors>(rows: &[E], length: usize) -> Vec<u32> {
    if cfg!(target_endian = "little") && length.is_multiple_of(E::PER_WORD) {
        // They are such words already, but not aligned.
        let mut words = vec![0u32; rows.len() / E::PER_WORD];
        // SAFETY: both have the same number of bytes, and any bits are a word.
        unsafe {
            std::ptr::copy_nonoverlapping(rows.as_ptr().cast::<u8>(), words.as_mut_ptr().cast(), size_of_val(rows))
        };
        return words;
    }
    rows.chunks_exact(length).flat_map(|row| row.chunks(E::PER_WORD).map(pack_word)).collect()
}

impl<E: Vectors> Work<E> {
    /// Raw scores of all rows against `tiles` (words, first slot).
    ///
    /// # Safety
    /// Each tile has `depth * 16` words and sixteen slots in a row of scores; the processor has the instruction set of `L`.
    #[inline(always)]
    unsafe fn score<L: Lanes<Element = E>>(&mut self, rows: usize, tiles: &[(*const u32, usize)]) {
        let (groups, rest) = tiles.as_chunks::<4>();
        // SAFETY: same contract.
        unsafe {
            if L::WIDE {
                for group in groups {
                    self.score_rows::<L, 4, 4>(rows, group);
                }
                for tile in rest {
                    self.score_rows::<L, 4, 1>(rows, &[*tile]);
                }
            } else {
                for tile in tiles {
                    self.score_rows::<L, 4, 1>(rows, &[*tile]);
                }
            }
        }
    }

    /// # Safety
    /// As [`Self::score`].
    #[inline(always)]
    unsafe fn score_rows<L: Lanes<Element = E>, const M: usize, const N: usize>(
        &mut self,
        rows: usize,
        tiles: &[(*const u32, usize); N],
    ) {
        let mut row = 0;
        // SAFETY: same contract.
        unsafe {
            while row + M <= rows {
                self.score_tile::<L, M, N>(row, tiles);
                row += M;
            }
            while row + 2 <= rows {
                self.score_tile::<L, 2, N>(row, tiles);
                row += 2;
            }
            if row < rows {
                self.score_tile::<L, 1, N>(row, tiles);
            }
        }
    }

    /// # Safety
    /// As [`Self::score`], for rows `row..row + M`.
    #[inline(always)]
    unsafe fn score_tile<L: Lanes<Element = E>, const M: usize, const N: usize>(
        &mut self,
        row: usize,
        tiles: &[(*const u32, usize); N],
    ) {
        // SAFETY: the rows exist and the tiles are as promised.
        unsafe {
            let queries = self.queries.as_ptr().add(row * self.depth);
            let mut sums = [[L::zero(); N]; M];
            for d in 0..self.depth {
                let mut keys = [L::splat(0); N];
                for (key, tile) in keys.iter_mut().zip(tiles) {
                    *key = L::load(tile.0.add(d * LANES));
                }
                for (m, sums) in sums.iter_mut().enumerate() {
                    let query = L::splat(*queries.add(m * self.depth + d));
                    for (sum, key) in sums.iter_mut().zip(keys) {
                        *sum = L::step(*sum, query, key);
                    }
                }
            }
            for (m, sums) in sums.iter().enumerate() {
                for (sum, tile) in sums.iter().zip(tiles) {
                    L::store(*sum, self.scores.as_mut_ptr().add((row + m) * self.slots + tile.1));
                }
            }
        }
    }
}

impl<E: Vectors> Attend<'_, E> {
    /// Tokens of `page` among the first `visible`.
    #[inline(always)]
    fn tokens_in(&self, page: usize, visible: usize) -> usize {
        visible.saturating_sub(page * self.layout.block_tokens).min(self.layout.block_tokens)
    }

    /// Turns one row's scores of `pages` into unnormalised probabilities; brings its maximum, total and sums up to date.
    #[inline(always)]
    fn softmax(
        &self,
        work: &mut Work<E>,
        row: usize,
        pages: std::ops::Range<usize>,
        page_slots: usize,
        max: &mut f32,
        total: &mut f32,
    ) {
        let used = pages.len() * page_slots;
        let scores = &mut work.scores[row * work.slots..][..used];
        let weights = &mut work.weights[row * work.slots..][..used];
        if self.tokens_in(pages.start, self.visible[row]) == 0 {
            weights.fill(E::default());
            return;
        }
        for (page, scores) in pages.zip(scores.chunks_exact_mut(page_slots)) {
            scores[self.tokens_in(page, self.visible[row])..].fill(f32::NEG_INFINITY);
        }
        let mut highest = [*max; LANES];
        for scores in scores.as_chunks_mut::<LANES>().0 {
            for (score, highest) in scores.iter_mut().zip(&mut highest) {
                *score *= self.scale;
                *highest = if *score > *highest { *score } else { *highest };
            }
        }
        let new_max = highest.into_iter().fold(*max, f32::max);
        let mut lanes = [0f32; LANES];
        for (scores, weights) in scores.as_chunks::<LANES>().0.iter().zip(weights.as_chunks_mut::<LANES>().0) {
            for i in 0..LANES {
                let weight = exp(scores[i] - new_max);
                lanes[i] += weight;
                weights[i] = E::narrow(weight);
            }
        }
        let correction = exp(*max - new_max);
        *total = *total * correction + tree_sum(&lanes);
        if correction != 1.0 {
            for sum in &mut work.sums[row * work.width..][..work.width] {
                *sum *= correction;
            }
        }
        *max = new_max;
    }

    /// Adds the values of `pages`, weighted, to the sums.
    ///
    /// # Safety
    /// The processor has the instruction set of `L`; pages were checked by [`attend`].
    #[inline(always)]
    unsafe fn add_values<L: Lanes<Element = E>>(
        &self,
        work: &mut Work<E>,
        pages: std::ops::Range<usize>,
        slots: usize,
    ) {
        let rows = self.visible.len();
        let mut row = 0;
        while row < rows {
            let group = if row + 4 <= rows { 4 } else { (rows - row).min(2) };
            let longest = self.visible[row..row + group].iter().copied().max().unwrap_or(0);
            let mut column = 0;
            while column < work.width {
                let left = (work.width - column) / LANES;
                let place = Place { row, column, longest, pages: pages.clone(), slots };
                // SAFETY: same contract.
                unsafe {
                    column += LANES
                        * match (group, L::WIDE && left >= 4) {
                            (4, true) => self.add_tile::<L, 4, 4>(work, place),
                            (4, false) => self.add_tile::<L, 4, 1>(work, place),
                            (2, true) => self.add_tile::<L, 2, 4>(work, place),
                            (2, false) => self.add_tile::<L, 2, 1>(work, place),
                            (_, true) => self.add_tile::<L, 1, 4>(work, place),
                            (_, false) => self.add_tile::<L, 1, 1>(work, place),
                        };
                }
            }
            row += group;
        }
    }

    /// `M` rows by `N` vectors of the sums; returns `N`.
    ///
    /// # Safety
    /// As [`Self::add_values`]; the place is inside the sums.
    #[inline(always)]
    unsafe fn add_tile<L: Lanes<Element = E>, const M: usize, const N: usize>(
        &self,
        work: &mut Work<E>,
        place: Place,
    ) -> usize {
        // SAFETY: the place is inside the sums, weights cover every slot of the chunk, and value pages hold a word row for every
        // `PER_WORD` tokens.
        unsafe {
            let sums_at = work.sums.as_mut_ptr().add(place.row * work.width + place.column);
            let mut sums = [[L::zero(); N]; M];
            for (m, sums) in sums.iter_mut().enumerate() {
                for (n, sum) in sums.iter_mut().enumerate() {
                    *sum = L::load_sums(sums_at.add(m * work.width + n * LANES));
                }
            }
            for (i, page) in place.pages.enumerate() {
                let tokens = self.tokens_in(page, place.longest);
                let values = self.pages[page].1.as_ptr().add(place.column);
                let weights = work.weights.as_ptr().add(place.row * work.slots + i * place.slots);
                let whole = tokens / E::PER_WORD;
                for word in 0..whole {
                    let values = values.add(word * work.width);
                    let mut loaded = [L::splat(0); N];
                    for (n, loaded) in loaded.iter_mut().enumerate() {
                        *loaded = L::load(values.add(n * LANES));
                    }
                    for (m, sums) in sums.iter_mut().enumerate() {
                        let weight = weights.add(m * work.slots + word * E::PER_WORD).cast::<u32>().read_unaligned();
                        for (sum, loaded) in sums.iter_mut().zip(loaded) {
                            *sum = L::step(*sum, L::splat(weight), loaded);
                        }
                    }
                }
                if whole * E::PER_WORD < tokens {
                    // The word's second token lies behind the context: whatever is stored there must not be multiplied.
                    for n in 0..N {
                        let mut words = [0u32; LANES];
                        for (lane, word) in words.iter_mut().enumerate() {
                            *word = *values.add(whole * work.width + n * LANES + lane) & 0xffff;
                        }
                        let loaded = L::load(words.as_ptr());
                        for (m, sums) in sums.iter_mut().enumerate() {
                            let weight =
                                weights.add(m * work.slots + whole * E::PER_WORD).cast::<u32>().read_unaligned();
                            sums[n] = L::step(sums[n], L::splat(weight & 0xffff), loaded);
                        }
                    }
                }
            }
            for (m, sums) in sums.iter().enumerate() {
                for (n, sum) in sums.iter().enumerate() {
                    L::store(*sum, sums_at.add(m * work.width + n * LANES));
                }
            }
        }
        N
    }
}

/// A tile of the sums and the tokens to add.
struct Place {
    row: usize,
    column: usize,
    longest: usize,
    pages: std::ops::Range<usize>,
    slots: usize,
}
