//! Launches of the attention kernels, and the choice among them.

use super::CudaBackend;
use super::driver::{Argument, Driver, Launch};
use super::memory::{Memory, Owned};
use super::tensor::{CudaBatch, CudaGeometry, CudaKvCache, CudaTensor, Tiles};
use super::tiles::{self, Cut};
use crate::device_memory::MemoryKind;
use crate::error::KernelError;
use crate::view::shape_error;

/// Longest head that `attention.cu` and `rope.cu` take.
pub(super) const MOST_HEAD_DIM: usize = 256;

/// Kernels of the specialised attention files.
pub(super) const KERNELS: &[(&str, &[&str])] = &[
    ("paged_decode", &DECODE),
    ("paged_prefill", &["paged_prefill_d64", "paged_prefill_d128"]),
    ("paged_prefill_sm90", &["paged_prefill_sm90_d64", "paged_prefill_sm90_d128", SEGMENT_HOPPER]),
    ("segment_attention", &["segment_rope", "segment_attention_d64", "segment_attention_d72", "segment_attention_d80"]),
];

/// Kernels that hold a tile of queries, and of keys and values twice: all take this much dynamic shared memory for heads of
/// `dim`.
fn tile_shared(dim: usize) -> usize {
    320 * (dim.next_multiple_of(16) + 8) * 2
}

/// Keys and values that neighbouring tiles of prefill may read between them: about two thirds of an H100's or H200's L2.
const WINDOW_BYTES: usize = 32 << 20;
/// Capability whose warpgroup instructions `paged_prefill_sm90.cu` is made of.
const HOPPER: (i32, i32) = (9, 0);
/// Segment attention in that file.
const SEGMENT_HOPPER: &str = "segment_attention_sm90_d64";

/// An attention kernel over a list of tiles: rows of a tile, threads and dynamic shared memory of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Tiled {
    kernel: &'static str,
    pub(super) tile_rows: usize,
    threads: u32,
    shared: usize,
    /// Blocks work through the list in turns, and take its length as their last argument; others have a tile and head each.
    turns: bool,
}

impl Tiled {
    /// On Hopper: keys and values in two stages of 128 rows, queries and outputs in two tiles of 128.
    const fn hopper(kernel: &'static str, dim: usize) -> Self {
        Self { kernel, tile_rows: 128, threads: 384, shared: 768 * dim * 2 + 2048, turns: true }
    }

    fn other(kernel: &'static str, dim: usize) -> Self {
        Self { kernel, tile_rows: 64, threads: 128, shared: tile_shared(dim), turns: false }
    }

    /// Shape of a launch over `tiles` of `heads` heads each.
    fn shape(&self, tiles: usize, heads: usize, multiprocessors: usize) -> Launch {
        let launch = match self.turns {
            true => Launch::rows(multiprocessors.min(tiles * heads), self.threads),
            false => Launch::rows(heads, self.threads).grid_y(tiles),
        };
        launch.shared(self.shared)
    }

    fn launch(
        &self,
        driver: &Driver,
        tiles: usize,
        heads: usize,
        mut arguments: Vec<Argument>,
    ) -> Result<(), KernelError> {
        if self.turns {
            arguments.push(Argument::Int(tiles as i32));
        }
        driver.launch(self.kernel, self.shape(tiles, heads, driver.multiprocessors), &arguments)
    }
}

/// Segment attention for heads of `dim`, if there is a kernel: by warpgroups on Hopper where a head is one swizzled row.
pub(super) fn segment_kernel(dim: usize, capability: (i32, i32)) -> Option<Tiled> {
    match (dim, capability) {
        (64, HOPPER) => Some(Tiled::hopper(SEGMENT_HOPPER, 64)),
        (64, _) => Some(Tiled::other("segment_attention_d64", 64)),
        (72, _) => Some(Tiled::other("segment_attention_d72", 72)),
        (80, _) => Some(Tiled::other("segment_attention_d80", 80)),
        _ => None,
    }
}

/// Prefill attention for heads of `dim` over blocks of `block_tokens`, if there is one: by warpgroups on Hopper.
fn prefill_kernel(dim: usize, block_tokens: usize, capability: (i32, i32)) -> Option<Tiled> {
    if !block_tokens.is_power_of_two() || block_tokens < 8 {
        return None;
    }
    match (dim, capability) {
        (64, HOPPER) => Some(Tiled::hopper("paged_prefill_sm90_d64", 64)),
        (128, HOPPER) => Some(Tiled::hopper("paged_prefill_sm90_d128", 128)),
        (64, _) => Some(Tiled::other("paged_prefill_d64", 64)),
        (128, _) => Some(Tiled::other("paged_prefill_d128", 128)),
        _ => None,
    }
}

/// Of paged_decode.cu, by head size and by whether a kv head has more than eight query heads.
const DECODE: [&str; 4] =
    ["paged_decode_d128_g8", "paged_decode_d128_g16", "paged_decode_d64_g8", "paged_decode_d64_g16"];
/// Query heads of a kv head that it takes at most.
const MOST_GROUP: usize = 16;
/// Blocks that share a multiprocessor.
const DECODE_BLOCKS: usize = 2;
/// (sequence, kv head) pairs of one launch at most.
const MOST_PAIRS: usize = 1 << 16;

/// What decode attention's blocks leave for each other between their parts.
#[derive(Debug)]
pub(super) struct DecodeScratch {
    partial: Owned,
    arrived: Owned,
}

impl DecodeScratch {
    pub fn new(driver: &Driver, memory: &Memory) -> Result<Self, KernelError> {
        for kernel in KERNELS.iter().flat_map(|(_, names)| names.iter()).filter(|name| **name != "segment_rope") {
            driver.allow_shared(kernel, driver.shared_bytes)?;
        }
        let blocks = DECODE_BLOCKS * driver.multiprocessors;
        let partial = memory.allocate(MemoryKind::Scratch, 4 * 2 * blocks * MOST_GROUP * (128 + 2))?;
        Ok(Self { partial, arrived: memory.allocate(MemoryKind::Scratch, 4 * MOST_PAIRS)? })
    }

    /// The counters, which start at zero: where, and how many bytes.
    pub fn counters(&self) -> (u64, usize) {
        (self.arrived.pointer, 4 * MOST_PAIRS)
    }
}

/// Kernel and dynamic shared memory of decode attention, if it takes this problem.
fn decode_kernel(heads: &Heads, sequences: usize, block_tokens: usize) -> Option<(&'static str, usize)> {
    let group = heads.query / heads.kv;
    let fits = block_tokens.is_power_of_two() && block_tokens >= 8 && sequences * heads.kv <= MOST_PAIRS;
    let wide = usize::from(group > MOST_GROUP / 2);
    let first = match heads.dim {
        128 => 0,
        64 => 2,
        _ => return None,
    };
    let shared = 3 * 4 * 64 * 128 + 11_264 + 8 * (sequences + 1);
    (fits && group <= MOST_GROUP).then(|| (DECODE[first + wide], shared))
}

/// Sizes of a step's attention.
pub(super) struct Heads {
    pub(super) query: usize,
    pub(super) kv: usize,
    pub(super) dim: usize,
}

impl CudaKvCache {
    /// Query heads in a row of `width` elements that also holds `others` heads.
    pub(super) fn heads(&self, op: &'static str, width: usize, others: usize) -> Result<Heads, KernelError> {
        let (kv, dim) = (self.kv_heads, self.head_dim);
        let query = (width / dim).saturating_sub(others);
        if !width.is_multiple_of(dim) || query == 0 || !query.is_multiple_of(kv) {
            return Err(shape_error(op, format!("row length {width} with {kv} kv heads of {dim}")));
        }
        Ok(Heads { query, kv, dim })
    }

    pub(super) fn check(&self, op: &'static str, batch: &CudaBatch, rows: usize) -> Result<(), KernelError> {
        if batch.rows != rows || batch.block_tokens != self.block_tokens {
            let (own, blocks) = (batch.rows, batch.block_tokens);
            let what = format!("{own} rows in blocks of {blocks} for {rows} rows in blocks of {}", self.block_tokens);
            return Err(shape_error(op, what));
        }
        match batch.largest_block {
            Some(block) if block as usize >= self.blocks => {
                Err(KernelError::Index { op, index: u64::from(block), limit: self.blocks as u64 })
            }
            _ => Ok(()),
        }
    }
}

/// Arguments of a kernel over pages: those that all have, then its `own`.
fn over_pages(q: &CudaTensor, batch: &CudaBatch, cache: &CudaKvCache, own: &[Argument]) -> Vec<Argument> {
    let pools = [cache.keys.pointer, cache.values.pointer].map(Argument::Pointer);
    let extents = [batch.table, batch.context, batch.query_start].map(Argument::Pointer);
    [&[q.argument()], &pools[..], &extents, own].concat()
}

impl CudaBackend {
    pub(super) fn attend(
        &self,
        q: &CudaTensor,
        batch: &CudaBatch,
        cache: &CudaKvCache,
        scale: f32,
    ) -> Result<CudaTensor, KernelError> {
        let op = "paged_attention";
        let (tokens, width) = q.matrix(op)?;
        let Heads { query, kv, dim } = cache.heads(op, width, 0)?;
        cache.check(op, batch, tokens)?;
        if dim > MOST_HEAD_DIM {
            return Err(shape_error(op, format!("heads of {dim}: up to {MOST_HEAD_DIM} are taken")));
        }
        let out = self.activation(&[tokens, width])?;
        let heads = Heads { query, kv, dim };
        let decode = decode_kernel(&heads, batch.sequences, cache.block_tokens)
            .filter(|(_, shared)| batch.decodes && *shared <= self.driver.shared_bytes);
        if let Some((kernel, shared)) = decode {
            self.attend_rows_alone(kernel, shared, [q, &out], batch, cache, &heads, scale)?;
            if batch.longest == 1 {
                return Ok(out);
            }
        }
        // A recorded step has one row a sequence, and no list of tiles that would fit every replay.
        if let Some(prefill) =
            prefill_kernel(dim, cache.block_tokens, self.driver.capability).filter(|_| batch.longest > 1)
            && self.attend_chunks(prefill, [q, &out], batch, cache, &heads, decode.is_some(), scale)?
        {
            return Ok(out);
        }
        let own = [
            out.argument(),
            Argument::Pointer(batch.width),
            Argument::Int(batch.sequences as i32),
            Argument::Int(query as i32),
            Argument::Int(kv as i32),
            Argument::Int(dim as i32),
            Argument::Int(cache.block_tokens as i32),
            Argument::Int(i32::from(decode.is_some())),
            Argument::Float(scale),
        ];
        let arguments = over_pages(q, batch, cache, &own);
        self.driver.launch("paged_attention_any", Launch::rows(tokens, 128).grid_y(query).alone(), &arguments)?;
        Ok(out)
    }

    /// Decode attention: the sequences of one query row.
    #[allow(clippy::too_many_arguments)] // One launch; a struct would only rename the list.
    fn attend_rows_alone(
        &self,
        kernel: &'static str,
        shared: usize,
        [q, out]: [&CudaTensor; 2],
        batch: &CudaBatch,
        cache: &CudaKvCache,
        heads: &Heads,
        scale: f32,
    ) -> Result<(), KernelError> {
        let own = [
            out.argument(),
            Argument::Pointer(self.decode.partial.pointer),
            Argument::Pointer(self.decode.arrived.pointer),
            Argument::Pointer(batch.width),
            Argument::Int(batch.sequences as i32),
            Argument::Int(heads.kv as i32),
            Argument::Int((heads.query / heads.kv) as i32),
            Argument::Int(cache.block_tokens.trailing_zeros() as i32),
            Argument::Float(scale),
        ];
        let blocks = DECODE_BLOCKS * self.driver.multiprocessors;
        self.driver.launch(kernel, Launch::rows(blocks, 128).shared(shared), &over_pages(q, batch, cache, &own))
    }

    /// Prefill attention: the sequences of several query rows, and with `decoded` unset those of one. False if the step's tiles are
    /// other ones.
    #[allow(clippy::too_many_arguments)] // One launch; a struct would only rename the list.
    fn attend_chunks(
        &self,
        prefill: Tiled,
        [q, out]: [&CudaTensor; 2],
        batch: &CudaBatch,
        cache: &CudaKvCache,
        heads: &Heads,
        decoded: bool,
        scale: f32,
    ) -> Result<bool, KernelError> {
        let group = heads.query / heads.kv;
        let tiles = match batch.tiles.get() {
            Some(tiles) => tiles,
            None => {
                let (query_start, context) = &*batch.extents;
                let token_bytes = 4 * heads.kv * heads.dim; // Of keys and values.
                let window_tokens = WINDOW_BYTES / token_bytes;
                let cut = Cut { group, tile_rows: prefill.tile_rows, skip_single: decoded, window_tokens };
                let list = tiles::causal(query_start, context, cut);
                let (count, list) = (list.len(), self.staged(list.as_flattened())?);
                batch.tiles.get_or_init(|| Tiles { list, count, group, skip_single: decoded })
            }
        };
        if tiles.group != group || tiles.skip_single != decoded {
            return Ok(false);
        }
        let own = [
            Argument::Pointer(tiles.list.pointer),
            out.argument(),
            Argument::Int(batch.stride as i32),
            Argument::Int(heads.kv as i32),
            Argument::Int(group as i32),
            Argument::Int(cache.block_tokens.trailing_zeros() as i32),
            Argument::Float(scale),
        ];
        prefill.launch(&self.driver, tiles.count, heads.kv, over_pages(q, batch, cache, &own))?;
        Ok(true)
    }

    pub(super) fn attend_segments(
        &self,
        qkv: &CudaTensor,
        heads: usize,
        geometry: &CudaGeometry,
        scale: f32,
    ) -> Result<CudaTensor, KernelError> {
        let op = "segment_attention";
        let (rows, width) = qkv.matrix(op)?;
        if heads == 0 || width == 0 || !width.is_multiple_of(6 * heads) {
            return Err(shape_error(op, format!("row length {width} is not 3 x {heads} heads of an even size")));
        }
        let dim = width / (3 * heads);
        if dim > MOST_HEAD_DIM {
            return Err(shape_error(op, format!("heads of {dim}: up to {MOST_HEAD_DIM} are taken")));
        }
        let segments = &geometry.segments;
        if geometry.angles != rows * dim / 2 || segments.last().is_none_or(|&end| end as usize != rows) {
            let what = format!("{} angles and segments {segments:?} for {rows} rows of {dim}", geometry.angles);
            return Err(shape_error(op, what));
        }
        let out = self.activation(&[rows, heads * dim])?;
        if let Some(kernel) = segment_kernel(dim, self.driver.capability) {
            let rotated = self.activation(&[rows, 2 * heads * dim])?;
            let rotate = [
                qkv.argument(),
                Argument::Pointer(geometry.cos.pointer),
                Argument::Pointer(geometry.sin.pointer),
                rotated.argument(),
                Argument::Int(heads as i32),
                Argument::Int(dim as i32),
            ];
            self.driver.launch("segment_rope", Launch::rows(rows, 256), &rotate)?;
            let arguments = vec![
                rotated.argument(),
                qkv.argument(),
                Argument::Pointer(geometry.start.pointer),
                Argument::Pointer(geometry.list.pointer),
                out.argument(),
                Argument::Int(heads as i32),
                Argument::Float(scale),
            ];
            kernel.launch(&self.driver, geometry.tiles, heads, arguments)?;
            return Ok(out);
        }
        let arguments = [
            qkv.argument(),
            Argument::Pointer(geometry.cos.pointer),
            Argument::Pointer(geometry.sin.pointer),
            Argument::Pointer(geometry.start.pointer),
            out.argument(),
            Argument::Int(segments.len() as i32 - 1),
            Argument::Int(heads as i32),
            Argument::Int(dim as i32),
            Argument::Float(scale),
        ];
        self.driver.launch("segment_attention_any", Launch::rows(rows, 128).grid_y(heads).alone(), &arguments)?;
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decode_attention_takes_what_it_was_made_for() {
        let kernel = |query, kv, dim, blocks| decode_kernel(&Heads { query, kv, dim }, 3, blocks).map(|(name, _)| name);
        assert_eq!(kernel(32, 8, 128, 16), Some("paged_decode_d128_g8"));
        assert_eq!(kernel(16, 1, 64, 8), Some("paged_decode_d64_g16"));
        assert_eq!(kernel(17, 1, 64, 8), None);
        assert_eq!(kernel(32, 8, 96, 16), None);
        assert_eq!(kernel(32, 8, 128, 24), None);
    }

    #[test]
    fn prefill_attention_goes_by_head_and_card() {
        let kernel = |dim, blocks, capability| prefill_kernel(dim, blocks, capability).map(|prefill| prefill.kernel);
        assert_eq!(kernel(128, 16, (9, 0)), Some("paged_prefill_sm90_d128"));
        assert_eq!(kernel(64, 16, (8, 9)), Some("paged_prefill_d64"));
        assert_eq!(kernel(96, 16, (9, 0)), None);
        assert_eq!(kernel(128, 12, (9, 0)), None);
    }

    #[test]
    fn segment_attention_goes_by_head_and_card() {
        let kernel = |dim, capability| segment_kernel(dim, capability).map(|tiled| (tiled.kernel, tiled.tile_rows));
        assert_eq!(kernel(64, (9, 0)), Some(("segment_attention_sm90_d64", 128)));
        assert_eq!(kernel(64, (8, 0)), Some(("segment_attention_d64", 64)));
        assert_eq!(kernel(72, (9, 0)), Some(("segment_attention_d72", 64)));
        assert_eq!(kernel(96, (9, 0)), None);
    }

    #[test]
    fn blocks_that_take_turns_are_as_many_as_there_is_work_for() {
        let tiled = segment_kernel(64, HOPPER).unwrap();
        assert_eq!(tiled.shape(3, 2, 132).grid, [6, 1, 1]);
        assert_eq!(tiled.shape(300, 16, 132).grid, [132, 1, 1]);
        assert_eq!(tiled.shape(0, 16, 132).grid[0], 0);
        assert_eq!(tiled.shared, 100_352);
        assert_eq!(segment_kernel(64, (8, 0)).unwrap().shape(300, 16, 132).grid, [16, 300, 1]);
    }
}
