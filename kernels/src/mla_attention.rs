//! Causal attention over latent pages, expanded for sequences with several rows, absorbed for those with one.
//!
//! Formulas: DeepSeek-V2 (arXiv 2405.04434), section 2.1; absorbed form checked against the expanded one in tests.

use candle_core::Tensor;

use crate::attend::{Attend, ROWS, attend};
use crate::batch;
use crate::element::Element;
use crate::error::KernelError;
use crate::host::Host;
use crate::kv_cache::{CpuKvCache, PageLayout, put_key, put_value};
use crate::matmul::{Product, matmul};
use crate::simd::{self, Kernel, Lanes, Vectors};
use crate::step::Ragged;
use crate::threads::SharedMut;
use crate::view::{View, shape_error, tensor};

/// Sizes of one layer.
#[derive(Clone, Copy)]
struct Sizes {
    heads: usize,
    nope: usize,
    rope: usize,
    value: usize,
    latent: usize,
}

/// What every sequence's attention reads, and where it writes.
struct Inputs<'a, E> {
    host: &'a Host,
    sizes: Sizes,
    q: &'a [E],
    kv_b: &'a [E],
    cache: &'a CpuKvCache,
    scale: f32,
    /// `[T, heads value]`.
    out: SharedMut<E>,
}

/// A sequence with one query row.
struct Single<'a> {
    row: usize,
    blocks: &'a [u32],
    /// Tokens that the row sees.
    context: usize,
}

/// See [`crate::Backend::mla_attention`].
pub(crate) fn mla_attention<E: Vectors>(
    host: &Host,
    q: &Tensor,
    kv_b: &Tensor,
    heads: usize,
    batch: &Ragged,
    cache: &CpuKvCache,
    scale: f32,
) -> Result<Tensor, KernelError> {
    let op = "mla_attention";
    let (q, kv_b) = (View::<E>::new(op, q)?, View::<E>::new(op, kv_b)?);
    let ((tokens, q_width), (kv_width, latent)) = (q.matrix()?, kv_b.matrix()?);
    let mismatch = || shape_error(op, format!("q {:?}, kv_b {:?}, {heads} heads", q.dims(), kv_b.dims()));
    if heads == 0 || q_width % heads != 0 || kv_width % heads != 0 || latent != cache.value_dim() {
        return Err(mismatch());
    }
    let rope = cache.key_dim().checked_sub(latent).ok_or_else(mismatch)?;
    let nope = (q_width / heads).checked_sub(rope).ok_or_else(mismatch)?;
    let value = (kv_width / heads).checked_sub(nope).filter(|&value| value > 0).ok_or_else(mismatch)?;
    cache.expect_element::<E>(op)?;
    batch::check(op, batch, tokens, cache.blocks(), cache.block_tokens())?;

    let mut out = vec![E::default(); tokens * heads * value];
    let inputs = Inputs {
        host,
        sizes: Sizes { heads, nope, rope, value, latent },
        q: q.data()?,
        kv_b: kv_b.data()?,
        cache,
        scale,
        out: SharedMut(out.as_mut_ptr()),
    };
    let mut single = Vec::new();
    for sequence in 0..batch.context.len() {
        let (rows, first) = batch::queries(batch, sequence);
        match rows.len() {
            0 => {}
            1 => single.push(Single { row: rows.start, blocks: &batch.blocks[sequence], context: first + 1 }),
            _ => inputs.expanded(rows, first, &batch.blocks[sequence]),
        }
    }
    let values = inputs.values(&single);
    let groups = heads.div_ceil(ABSORBED_HEADS);
    host.threads.run(single.len() * groups, &|index| {
        let sequence = &single[index / groups];
        inputs.absorbed(sequence, index % groups * ABSORBED_HEADS, &values[index / groups]);
    });
    tensor(out, &[tokens, heads * value])
}

/// Heads of one absorbed task.
const ABSORBED_HEADS: usize = 8;
/// Pages whose values one task takes out.
const PAGES_A_TASK: usize = 8;

/// sums += x W, rows of `w` as long as `sums`, in row order.
struct Transposed<'a, E> {
    x: &'a [E],
    w: &'a [E],
    sums: &'a mut [f32],
}

impl<E: Element> Kernel<E> for Transposed<'_, E> {
    #[inline(always)]
    unsafe fn call<L: Lanes<Element = E>>(self) {
        for (x, row) in self.x.iter().zip(self.w.chunks_exact(self.sums.len())) {
            for (sum, w) in self.sums.iter_mut().zip(row) {
                *sum += x.widen() * w.widen();
            }
        }
    }
}

impl<E: Vectors> Inputs<'_, E> {
    /// Query rows `rows` of one sequence, the first at position `first`: keys and values of all tokens are made again from the
    /// latents, then each head attends.
    fn expanded(&self, rows: std::ops::Range<usize>, first: usize, blocks: &[u32]) {
        let Sizes { heads, nope, rope, value, latent } = self.sizes;
        let context = first + rows.len();
        let mut latents = vec![E::default(); context * latent];
        let mut rotated = vec![E::default(); context * rope];
        let block_tokens = self.cache.block_tokens();
        for (t, latents) in latents.chunks_exact_mut(latent).enumerate() {
            let block = blocks[t / block_tokens] as usize;
            self.cache.read(block, t % block_tokens, latents, &mut rotated[t * rope..(t + 1) * rope]);
        }
        let width = nope + value;
        let columns = heads * width;
        let product = Product { x: &latents, w: self.kv_b, rows: context, columns, depth: latent, bias: None };
        let expanded: Vec<E> = matmul(self.host, product);
        let layout = PageLayout::new::<E>(block_tokens, 1, nope + rope, value);
        self.host.threads.run(heads, &|head| {
            let mut key = vec![E::default(); nope + rope];
            let packed: Vec<_> = (0..context)
                .step_by(block_tokens)
                .map(|start| {
                    let mut keys = vec![0; layout.key_page_words()];
                    let mut values = vec![0; layout.value_page_words()];
                    for t in start..context.min(start + block_tokens) {
                        let row = &expanded[(t * heads + head) * width..][..width];
                        key[..nope].copy_from_slice(&row[..nope]);
                        key[nope..].copy_from_slice(&rotated[t * rope..(t + 1) * rope]);
                        put_key(&layout, &mut keys, t - start, &key);
                        put_value(&layout, &mut values, t - start, &row[nope..]);
                    }
                    (keys, values)
                })
                .collect();
            let pages: Vec<_> = packed.iter().map(|(keys, values)| (keys.as_slice(), values.as_slice())).collect();
            let q_width = heads * (nope + rope);
            for start in rows.clone().step_by(ROWS) {
                let taken = start..rows.end.min(start + ROWS);
                let query = |row: usize| &self.q[row * q_width + head * (nope + rope)..][..nope + rope];
                let queries: Vec<E> = taken.clone().flat_map(query).copied().collect();
                let visible: Vec<usize> = taken.clone().map(|row| first + 1 + row - rows.start).collect();
                let mut result = vec![E::default(); taken.len() * value];
                let (pages, queries, visible) = (&pages, &queries, &visible);
                attend(self.host.isa, Attend { layout, pages, queries, visible, scale: self.scale, out: &mut result });
                for (row, result) in taken.zip(result.chunks_exact(value)) {
                    self.write(row, head, result);
                }
            }
        });
    }

    /// Value pages of each sequence, taken out of the latents' pages once for all heads.
    fn values(&self, single: &[Single<'_>]) -> Vec<Vec<Vec<u32>>> {
        let block_tokens = self.cache.block_tokens();
        let mut values: Vec<Vec<Vec<u32>>> =
            single.iter().map(|one| vec![Vec::new(); one.context.div_ceil(block_tokens)]).collect();
        for (one, pages) in single.iter().zip(&mut values) {
            self.host.threads.for_pieces(pages, PAGES_A_TASK, |index, pages| {
                for (page, out) in (index * PAGES_A_TASK..).zip(pages) {
                    let tokens = block_tokens.min(one.context - page * block_tokens);
                    *out = self.cache.latent_values(one.blocks[page] as usize, tokens);
                }
            });
        }
        values
    }

    /// Up to [`ABSORBED_HEADS`] heads from `first_head` of a sequence's one row: the key half of `kv_b` is applied to the query, the
    /// value half to the weighted latent.
    fn absorbed(&self, sequence: &Single<'_>, first_head: usize, values: &[Vec<u32>]) {
        let Single { row, blocks, context } = *sequence;
        let Sizes { heads, nope, rope, value, latent } = self.sizes;
        let taken = first_head..heads.min(first_head + ABSORBED_HEADS);
        let weights = |head: usize| &self.kv_b[head * (nope + value) * latent..][..(nope + value) * latent];
        let mut queries = Vec::with_capacity(taken.len() * (latent + rope));
        for head in taken.clone() {
            let query = &self.q[(row * heads + head) * (nope + rope)..][..nope + rope];
            let mut sums = vec![0f32; latent];
            let product = Transposed { x: &query[..nope], w: weights(head), sums: &mut sums };
            simd::run(self.host.isa, product);
            queries.extend(sums.into_iter().map(E::narrow));
            queries.extend_from_slice(&query[nope..]);
        }
        let pages: Vec<_> = blocks[..context.div_ceil(self.cache.block_tokens())]
            .iter()
            .zip(values)
            .map(|(&block, values)| (self.cache.key_page(block as usize, 0), values.as_slice()))
            .collect();
        let visible = vec![context; taken.len()];
        let mut mixed = vec![E::default(); taken.len() * latent];
        let (layout, scale) = (*self.cache.layout(), self.scale);
        let parts = Attend { layout, pages: &pages, queries: &queries, visible: &visible, scale, out: &mut mixed };
        attend(self.host.isa, parts);
        for (head, mixed) in taken.zip(mixed.chunks_exact(latent)) {
            let w = &weights(head)[nope * latent..];
            // Inside one of several tasks `matmul` finds the threads taken and runs alone.
            let product = Product { x: mixed, w, rows: 1, columns: value, depth: latent, bias: None };
            let result: Vec<E> = matmul(self.host, product);
            self.write(row, head, &result);
        }
    }

    /// Stores one row's output of one head.
    fn write(&self, row: usize, head: usize, result: &[E]) {
        let at = (row * self.sizes.heads + head) * self.sizes.value;
        // SAFETY: one task computes a row of a head, and (row, head) lies within `out`, whose owner waits for all tasks.
        unsafe { std::ptr::copy_nonoverlapping(result.as_ptr(), self.out.get().add(at), result.len()) };
    }
}
