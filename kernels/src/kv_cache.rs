//! The CPU's pool of key and value pages, laid out for the attention kernel.
//!
//! Unit is a 32-bit word: one f32 or two bf16. Keys of sixteen tokens lie side by side (`[block][kv head][tile][d words][16]`,
//! a word pairs neighbouring d), so one vector step advances sixteen scores. Values are `[block][kv head][token words][d]`
//! (a word pairs neighbouring tokens), so one step advances sixteen output elements. A pool of latents has keys alone: a value is
//! the first part of its key. Allocated zeroed by the OS: unused pages cost no memory.

use crate::element::Element;
use crate::error::KernelError;
use crate::host::Host;
use crate::norm::PIECE_ELEMENTS;
use crate::threads::SharedMut;
use crate::view::shape_error;

/// Tokens of one key tile, and elements of one value vector.
pub(crate) const TILE: usize = 16;

/// Keys and values of one layer on the CPU.
#[derive(Debug)]
pub struct CpuKvCache {
    blocks: usize,
    layout: PageLayout,
    keys: Vec<u32>,
    /// Empty in a pool of latents.
    values: Vec<u32>,
}

/// Sizes of one page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PageLayout {
    pub(crate) block_tokens: usize,
    pub(crate) kv_heads: usize,
    /// Elements of one key.
    pub(crate) key_dim: usize,
    /// Elements of one value.
    pub(crate) value_dim: usize,
    /// Elements in one word: 2 for bf16, 1 for f32.
    per_word: usize,
}

impl PageLayout {
    /// Layout for elements of type `E`.
    pub(crate) fn new<E: Element>(block_tokens: usize, kv_heads: usize, key_dim: usize, value_dim: usize) -> Self {
        Self { block_tokens, kv_heads, key_dim, value_dim, per_word: E::PER_WORD }
    }

    /// Words along d of one key.
    pub(crate) fn key_depth(&self) -> usize {
        self.key_dim.div_ceil(self.per_word)
    }

    /// Words of one tile of sixteen keys.
    pub(crate) fn key_tile_words(&self) -> usize {
        self.key_depth() * TILE
    }

    /// Words of one head's keys in one page.
    pub(crate) fn key_page_words(&self) -> usize {
        self.block_tokens.div_ceil(TILE) * self.key_tile_words()
    }

    /// Words of one row of values: d padded to whole vectors.
    pub(crate) fn value_row_words(&self) -> usize {
        self.value_dim.next_multiple_of(TILE)
    }

    /// Words of one head's values in one page.
    pub(crate) fn value_page_words(&self) -> usize {
        self.block_tokens.div_ceil(self.per_word) * self.value_row_words()
    }
}

fn put<E: Element>(word: &mut u32, half: usize, value: E) {
    if E::PER_WORD == 1 {
        *word = value.widen().to_bits();
    } else {
        let bits = value.widen().to_bits() >> 16;
        let shift = 16 * half as u32;
        *word = (*word & !(0xffff << shift)) | (bits << shift);
    }
}

fn take<E: Element>(word: u32, half: usize) -> E {
    let bits = if E::PER_WORD == 1 { word } else { (word >> (16 * half as u32)) << 16 };
    E::narrow(f32::from_bits(bits))
}

/// One word of up to [`Element::PER_WORD`] elements, the rest zero.
#[inline(always)]
pub(crate) fn pack_word<E: Element>(elements: &[E]) -> u32 {
    if E::PER_WORD == 1 {
        return elements[0].widen().to_bits();
    }
    elements.iter().rev().fold(0, |packed, element| (packed << 16) | (element.widen().to_bits() >> 16))
}

/// Writes one key into a page of keys of its head; the half word behind an odd key becomes zero.
pub(crate) fn put_key<E: Element>(layout: &PageLayout, page: &mut [u32], row: usize, key: &[E]) {
    let tile = &mut page[row / TILE * layout.key_tile_words()..][..layout.key_tile_words()];
    for (column, elements) in tile.as_chunks_mut::<TILE>().0.iter_mut().zip(key.chunks(E::PER_WORD)) {
        column[row % TILE] = pack_word(elements);
    }
}

/// Writes one value into a page of values of its head.
pub(crate) fn put_value<E: Element>(layout: &PageLayout, page: &mut [u32], row: usize, value: &[E]) {
    let start = row / E::PER_WORD * layout.value_row_words();
    for (word, &element) in page[start..].iter_mut().zip(value) {
        put(word, row % E::PER_WORD, element);
    }
}

/// One token's key and value of one head, and where they go.
pub(crate) struct Token<'a, E> {
    pub(crate) block: usize,
    pub(crate) row: usize,
    pub(crate) key: &'a [E],
    pub(crate) value: &'a [E],
}

/// Reads back elements `from..` of one key that [`put_key`] wrote.
fn take_key<E: Element>(layout: &PageLayout, page: &[u32], row: usize, from: usize, out: &mut [E]) {
    let tile = &page[row / TILE * layout.key_tile_words()..];
    for (d, out) in (from..).zip(out) {
        *out = take(tile[d / E::PER_WORD * TILE + row % TILE], d % E::PER_WORD);
    }
}

impl CpuKvCache {
    /// A zeroed pool of keys and values.
    pub(crate) fn new<E: Element>(
        op: &'static str,
        blocks: usize,
        block_tokens: usize,
        kv_heads: usize,
        head_dim: usize,
    ) -> Result<Self, KernelError> {
        let mut pool = Self::keys_alone::<E>(op, blocks, block_tokens, kv_heads, [head_dim, head_dim])?;
        pool.values = vec![0; pool.words(op, pool.layout.value_page_words())?];
        Ok(pool)
    }

    /// A zeroed pool of latents: keys of `latent + rotated` elements, values in them.
    pub(crate) fn of_latents<E: Element>(
        op: &'static str,
        blocks: usize,
        block_tokens: usize,
        latent: usize,
        rotated: usize,
    ) -> Result<Self, KernelError> {
        Self::keys_alone::<E>(op, blocks, block_tokens, 1, [latent + rotated, latent])
    }

    fn keys_alone<E: Element>(
        op: &'static str,
        blocks: usize,
        block_tokens: usize,
        kv_heads: usize,
        [key_dim, value_dim]: [usize; 2],
    ) -> Result<Self, KernelError> {
        if block_tokens == 0 || kv_heads == 0 || key_dim == 0 || value_dim == 0 {
            let what = format!("pages of {block_tokens} tokens x {kv_heads} heads x ({key_dim} + {value_dim})");
            return Err(shape_error(op, what));
        }
        let layout = PageLayout::new::<E>(block_tokens, kv_heads, key_dim, value_dim);
        let mut pool = Self { blocks, layout, keys: Vec::new(), values: Vec::new() };
        pool.keys = vec![0; pool.words(op, layout.key_page_words())?];
        Ok(pool)
    }

    /// Words of all pages of `page` words for each head.
    fn words(&self, op: &'static str, page: usize) -> Result<usize, KernelError> {
        let (heads, blocks) = (self.layout.kv_heads, self.blocks);
        page.checked_mul(heads)
            .and_then(|block| block.checked_mul(blocks))
            .filter(|&words| words < isize::MAX as usize / 4)
            .ok_or_else(|| shape_error(op, format!("{blocks} blocks of {page} words x {heads} overflow")))
    }

    /// Bytes that were asked of the system, padding included.
    pub fn bytes(&self) -> usize {
        (self.keys.len() + self.values.len()) * size_of::<u32>()
    }

    /// Pages in the pool.
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// Tokens in one page.
    pub fn block_tokens(&self) -> usize {
        self.layout.block_tokens
    }

    /// Key and value heads.
    pub fn kv_heads(&self) -> usize {
        self.layout.kv_heads
    }

    /// Elements of one key.
    pub fn key_dim(&self) -> usize {
        self.layout.key_dim
    }

    /// Elements of one value.
    pub fn value_dim(&self) -> usize {
        self.layout.value_dim
    }

    /// Words of one block's keys and of its values; latents have their values among the keys.
    fn block_words(&self) -> (usize, usize) {
        let values = if self.values.is_empty() { 0 } else { self.layout.value_page_words() };
        (self.layout.kv_heads * self.layout.key_page_words(), self.layout.kv_heads * values)
    }

    /// Bytes of one block, keys and values, padding included.
    pub fn block_bytes(&self) -> usize {
        let (keys, values) = self.block_words();
        (keys + values) * size_of::<u32>()
    }

    fn expect_block(&self, op: &'static str, block: usize, bytes: usize) -> Result<(), KernelError> {
        if block >= self.blocks {
            return Err(KernelError::Index { op, index: block as u64, limit: self.blocks as u64 });
        }
        if bytes != self.block_bytes() {
            return Err(shape_error(op, format!("{bytes} bytes for a block of {}", self.block_bytes())));
        }
        Ok(())
    }

    /// Copies a block out, keys then values, words in little-endian order.
    ///
    /// # Errors
    /// No such block, or not [`Self::block_bytes`] bytes.
    pub fn read_block(&self, block: usize, out: &mut [u8]) -> Result<(), KernelError> {
        self.expect_block("read_kv_block", block, out.len())?;
        let (keys, values) = self.block_words();
        let words = self.keys[block * keys..][..keys].iter().chain(&self.values[block * values..][..values]);
        for (bytes, word) in out.as_chunks_mut::<4>().0.iter_mut().zip(words) {
            *bytes = word.to_le_bytes();
        }
        Ok(())
    }

    /// Copies back what [`Self::read_block`] gave.
    ///
    /// # Errors
    /// As [`Self::read_block`].
    pub fn write_block(&mut self, block: usize, bytes: &[u8]) -> Result<(), KernelError> {
        self.expect_block("write_kv_block", block, bytes.len())?;
        let (keys, values) = self.block_words();
        let words = self.keys[block * keys..][..keys].iter_mut().chain(&mut self.values[block * values..][..values]);
        for (word, bytes) in words.zip(bytes.as_chunks::<4>().0) {
            *word = u32::from_le_bytes(*bytes);
        }
        Ok(())
    }

    /// Errors unless the pool was made for elements of type `E`.
    pub(crate) fn expect_element<E: Element>(&self, op: &'static str) -> Result<(), KernelError> {
        if self.layout.per_word == E::PER_WORD {
            return Ok(());
        }
        Err(shape_error(op, format!("pages hold {} elements to a word, not {}", self.layout.per_word, E::PER_WORD)))
    }

    pub(crate) fn layout(&self) -> &PageLayout {
        &self.layout
    }

    /// One head's keys in one page.
    pub(crate) fn key_page(&self, block: usize, head: usize) -> &[u32] {
        let words = self.layout.key_page_words();
        &self.keys[(block * self.layout.kv_heads + head) * words..][..words]
    }

    /// One head's values in one page; not in a pool of latents.
    pub(crate) fn value_page(&self, block: usize, head: usize) -> &[u32] {
        let words = self.layout.value_page_words();
        &self.values[(block * self.layout.kv_heads + head) * words..][..words]
    }

    /// The values of a page of latents, out of its first `tokens` keys, laid out as [`Self::value_page`]; zero behind them.
    pub(crate) fn latent_values(&self, block: usize, tokens: usize) -> Vec<u32> {
        let (layout, keys) = (&self.layout, self.key_page(block, 0));
        let width = layout.value_row_words();
        let mut page = vec![0; layout.value_page_words()];
        let word = |column: usize, row: usize| {
            if row >= tokens {
                return 0;
            }
            keys[row / TILE * layout.key_tile_words() + column * TILE + row % TILE]
        };
        for (pair, values) in page.chunks_exact_mut(width).enumerate() {
            let values = &mut values[..layout.value_dim];
            if layout.per_word == 1 {
                values.iter_mut().enumerate().for_each(|(d, value)| *value = word(d, pair));
                continue;
            }
            for (column, halves) in values.chunks_mut(2).enumerate() {
                let (first, second) = (word(column, 2 * pair), word(column, 2 * pair + 1));
                let both = [(first & 0xffff) | (second << 16), (first >> 16) | (second & 0xffff_0000)];
                halves.iter_mut().zip(both).for_each(|(half, word)| *half = word);
            }
        }
        page
    }

    /// Stores tokens: `each` is called once for every kv head, on any thread, and hands that head's tokens to its writer.
    /// `elements` is the number of key elements to come.
    pub(crate) fn write<E: Element>(
        &mut self,
        host: &Host,
        elements: usize,
        each: impl Fn(usize, &mut dyn FnMut(Token<'_, E>)) + Sync,
    ) {
        let (layout, blocks) = (self.layout, self.blocks);
        let (key_words, value_words) = (layout.key_page_words(), layout.value_page_words());
        let value_words = if self.values.is_empty() { 0 } else { value_words };
        let (keys, values) = (SharedMut(self.keys.as_mut_ptr()), SharedMut(self.values.as_mut_ptr()));
        let write_head = |head: usize| {
            each(head, &mut |token| {
                assert!(token.block < blocks && token.row < layout.block_tokens);
                let page = token.block * layout.kv_heads + head;
                // SAFETY: the block is in the pool, and a head's pages belong to the one task that has this head.
                let (keys, values) = unsafe {
                    (
                        std::slice::from_raw_parts_mut(keys.get().add(page * key_words), key_words),
                        std::slice::from_raw_parts_mut(values.get().add(page * value_words), value_words),
                    )
                };
                put_key(&layout, keys, token.row, token.key);
                if !values.is_empty() {
                    put_value(&layout, values, token.row, token.value);
                }
            });
        };
        if elements < PIECE_ELEMENTS {
            (0..layout.kv_heads).for_each(write_head);
        } else {
            host.threads.run(layout.kv_heads, &write_head);
        }
    }

    /// Copies out one token of a pool of latents: its value and the rest of its key.
    pub(crate) fn read<E: Element>(&self, block: usize, row: usize, value: &mut [E], key_end: &mut [E]) {
        let (page, from) = (self.key_page(block, 0), value.len());
        take_key(&self.layout, page, row, 0, value);
        take_key(&self.layout, page, row, from, key_end);
    }

    /// Sets every element of every page, padding included: for tests that poison what must not be read.
    pub fn fill(&mut self, value: f32) {
        let bits = value.to_bits();
        let word = if self.layout.per_word == 1 { bits } else { (bits >> 16) | (bits & 0xffff_0000) };
        self.keys.fill(word);
        self.values.fill(word);
    }
}
