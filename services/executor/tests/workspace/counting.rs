//! A device that computes nothing and counts memory as the CUDA backend takes it: the same pieces in the same order out of the
//! same books, with a size that runs out.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

use candle_core::DType;
use millrace_kernels::{
    Backend, DeviceMemory, Draw, Finished, Forward, GeluKind, HostMemory, KernelError, MemoryKind, MemoryReader,
    PatchGrids, PatchPage, Place, RopeTable, Segments, SigmoidChoice, SlabBook, Staged, StepInputs,
};

/// Rows up to which SwiGLU is one launch.
const FUSED_ROWS: usize = 8;
const ELEMENT: usize = 2;
/// Of the vision towers that are counted: angles of a patch.
const HALF_HEAD: usize = 32;

#[derive(Debug, Default)]
struct Books {
    memory: DeviceMemory,
    slabs: [SlabBook; 3],
    recording: bool,
    /// Batch sizes that are recorded.
    recorded: Vec<usize>,
    /// Bytes of the buffer that steps' inputs are staged in.
    staging: u64,
    /// Most bytes of activations taken at once.
    peak: usize,
}

impl Books {
    fn allocate(&mut self, kind: MemoryKind, bytes: u64) -> Result<(), KernelError> {
        self.memory.allocations += 1;
        if bytes > self.memory.free_bytes {
            return Err(KernelError::OutOfMemory { kind, asked_bytes: bytes, memory: Box::new(self.memory) });
        }
        self.memory.free_bytes -= bytes;
        self.memory.held[kind as usize] += bytes;
        Ok(())
    }
}

impl Books {
    /// Room for the inputs of a step whose batch is padded to `sequences`: the buffer grows in steps of 4 MiB, and what is recorded
    /// holds its address.
    fn stage(&mut self, inputs: &StepInputs, rows: usize, sequences: usize) -> Result<(), KernelError> {
        let contexts = inputs.ragged.context.iter().map(|tokens| *tokens as usize);
        let stride = contexts.max().unwrap_or(0).div_ceil(inputs.block_tokens);
        let tail = inputs.tail().map_or(0, |tail| tail.len());
        let words = 6 * rows + (sequences + tail) * (2 + stride);
        let bytes = (4 * words as u64).next_multiple_of(4 << 20);
        if bytes > self.staging {
            self.allocate(MemoryKind::Scratch, bytes)?;
            self.memory.free_bytes += self.staging;
            self.memory.held[MemoryKind::Scratch as usize] -= self.staging;
            self.staging = bytes;
            self.recorded.clear();
        }
        Ok(())
    }
}

/// An allocation of its own.
#[derive(Debug)]
pub struct Owned(Arc<Mutex<Books>>, MemoryKind, u64);

impl Drop for Owned {
    fn drop(&mut self) {
        let mut books = self.0.lock().unwrap();
        books.memory.free_bytes += self.2;
        books.memory.held[self.1 as usize] -= self.2;
    }
}

#[derive(Debug)]
struct Piece(Arc<Mutex<Books>>, usize, Place);

impl Drop for Piece {
    fn drop(&mut self) {
        self.0.lock().unwrap().slabs[self.1].give_back(self.2);
    }
}

/// A tensor, or anything else that lives in a piece.
#[derive(Debug, Clone)]
pub struct Counted {
    shape: Vec<usize>,
    _piece: Option<Arc<Piece>>,
    _owned: Option<Arc<Owned>>,
}

/// The device.
#[derive(Debug, Clone)]
pub struct Counting(Arc<Mutex<Books>>);

type Done<T> = Result<T, KernelError>;

impl Counting {
    /// A device of `bytes`, of which the backend's own scratch memory is taken.
    pub fn new(bytes: u64) -> Self {
        let memory = DeviceMemory { free_bytes: bytes, total_bytes: bytes, ..DeviceMemory::default() };
        let books = Books { memory, ..Books::default() };
        let own = Self(Arc::new(Mutex::new(books)));
        // cuBLASLt's workspace; decode attention's partial results (H200) and counters.
        own.lock().allocate(MemoryKind::Scratch, (32 << 20) + 4 * 2 * 2 * 132 * 16 * 130 + (4 << 16)).unwrap();
        own
    }

    fn lock(&self) -> MutexGuard<'_, Books> {
        self.0.lock().unwrap()
    }

    pub fn memory(&self) -> DeviceMemory {
        self.lock().memory
    }

    /// Most bytes of ordinary steps' activations at once.
    pub fn peak(&self) -> usize {
        self.lock().peak
    }

    fn piece_of(&self, which: usize, shape: &[usize], element: usize) -> Done<Counted> {
        let kinds = [MemoryKind::Activations, MemoryKind::RecordedSteps, MemoryKind::Features];
        let bytes = shape.iter().product::<usize>() * element;
        let mut books = self.lock();
        let place = match books.slabs[which].take(bytes) {
            Some(place) => place,
            None => {
                let slab = SlabBook::slab_bytes(bytes);
                books.allocate(kinds[which], slab as u64)?;
                books.slabs[which].add(slab);
                books.slabs[which].take(bytes).unwrap()
            }
        };
        books.peak = books.peak.max(books.slabs[0].taken());
        let piece = Arc::new(Piece(self.0.clone(), which, place));
        Ok(Counted { shape: shape.to_vec(), _piece: Some(piece), _owned: None })
    }

    fn piece(&self, shape: &[usize], element: usize) -> Done<Counted> {
        let which = usize::from(self.lock().recording);
        self.piece_of(which, shape, element)
    }

    fn tensor(&self, shape: &[usize]) -> Done<Counted> {
        self.piece(shape, ELEMENT)
    }

    fn owned(&self, kind: MemoryKind, shape: &[usize]) -> Done<Counted> {
        let bytes = (shape.iter().product::<usize>() * ELEMENT) as u64;
        self.lock().allocate(kind, bytes)?;
        let owned = Arc::new(Owned(self.0.clone(), kind, bytes));
        Ok(Counted { shape: shape.to_vec(), _piece: None, _owned: Some(owned) })
    }

    fn rows_by(&self, rows: usize, x: &Counted) -> Done<Counted> {
        self.tensor(&[&[rows], &x.shape[1..]].concat())
    }
}

/// As the CUDA backend pads batches.
fn bucket(rows: usize) -> usize {
    if rows <= 8 { rows } else { rows.next_multiple_of(rows.next_power_of_two() / 8) }
}

fn none<T>(op: &'static str) -> Done<T> {
    Err(KernelError::Unsupported { op, what: "not counted".into() })
}

impl Backend for Counting {
    type Tensor = Counted;
    type KvCache = Counted;
    type Routing = ();
    type Indices = Counted;
    /// Rows, and the tiles of its attention.
    type Batch = Counted;
    type Frequencies = [Counted; 2];
    /// Sizes, segments, tiles, cos, sin.
    type Geometry = [Counted; 5];
    type Logits = Counted;
    type Flight = Finished;

    fn dtype(&self) -> DType {
        DType::BF16
    }
    fn free_bytes(&self) -> Done<Option<u64>> {
        Ok(Some(self.memory().free_bytes))
    }
    fn memory_reader(&self) -> Option<MemoryReader> {
        let own = self.clone();
        Some(Arc::new(move || Ok(own.memory())))
    }
    fn join_memory(&self) -> Done<()> {
        let mut books = self.lock();
        let Some(bytes) = books.slabs[0].joined_bytes() else { return Ok(()) };
        let freed = std::mem::take(&mut books.slabs[0]).bytes() as u64;
        books.memory.free_bytes += freed;
        books.memory.held[MemoryKind::Activations as usize] -= freed;
        books.allocate(MemoryKind::Activations, bytes as u64)?;
        books.slabs[0].add(bytes);
        Ok(())
    }
    fn weight(&self, host: &candle_core::Tensor) -> Done<Counted> {
        self.owned(MemoryKind::Weights, host.dims())
    }
    fn weight_f32(&self, _: &candle_core::Tensor) -> Done<Counted> {
        none("weight_f32")
    }
    fn upload(&self, _: &[f32], shape: &[usize]) -> Done<Counted> {
        self.tensor(shape)
    }
    fn patches(&self, pages: &[PatchPage<'_>], temporal: usize) -> Done<Counted> {
        let width = pages[0].channels * temporal * pages[0].area;
        let out = self.tensor(&[pages.iter().map(|page| page.rows).sum(), width])?;
        for page in pages {
            drop(self.piece(&[page.bytes.len()], 1)?);
        }
        Ok(out)
    }
    fn to_host(&self, x: &Counted) -> Done<Vec<f32>> {
        Ok(vec![0.0; x.shape.iter().product()])
    }
    fn shape(&self, x: &Counted) -> Vec<usize> {
        x.shape.clone()
    }
    fn reshape(&self, x: &Counted, shape: &[usize]) -> Done<Counted> {
        Ok(Counted { shape: shape.to_vec(), ..x.clone() })
    }
    fn indices(&self, values: Vec<u32>) -> Done<Counted> {
        self.piece(&[values.len()], 4)
    }

    fn keep(&self, x: &Counted) -> Done<Counted> {
        self.piece_of(2, &x.shape, ELEMENT)
    }
    fn tensor_bytes(&self, x: &Counted) -> usize {
        x.shape.iter().product::<usize>() * ELEMENT
    }
    fn read_tensor(&self, _: &Counted, host: &mut HostMemory, offset: usize) -> Done<()> {
        host.part(offset, 0).map(|_| ())
    }
    fn write_tensor(&self, shape: &[usize], _: &mut HostMemory, _: usize) -> Done<Counted> {
        self.piece_of(2, shape, ELEMENT)
    }

    fn step<E: From<KernelError>>(&self, inputs: StepInputs, forward: &mut Forward<'_, Self, E>) -> Result<Counted, E> {
        let mut rows = inputs.ids.len();
        let bare = |count| Counted { shape: vec![count], _piece: None, _owned: None };
        let logits = bare(inputs.logit_rows.len());
        let mut sequences = inputs.ragged.context.len();
        if inputs.replayable {
            (rows, sequences) = (bucket(rows), bucket(sequences));
        }
        let mut books = self.lock();
        books.stage(&inputs, rows, sequences)?;
        if inputs.replayable {
            if books.recorded.contains(&rows) {
                return Ok(logits);
            }
            books.recorded.push(rows);
            books.recording = true;
        }
        drop(books);
        // The list of tiles: a tile of 128 rows of 4 query heads each, 16 bytes.
        let batch = self.piece(&[rows.div_ceil(32) + inputs.ragged.context.len(), 4], 4)?;
        let tail = match inputs.tail() {
            Some(tail) => Some(self.piece(&[inputs.logit_rows.len().div_ceil(32) + tail.len(), 4], 4)?),
            None => None,
        };
        let logit_rows = bare(inputs.logit_rows.len());
        let staged = Staged { ids: bare(rows), positions: bare(3 * rows), batch, logit_rows, tail };
        let run = forward(&staged);
        self.lock().recording = false;
        run.map(|_| logits)
    }

    fn recorded_batches(&self, most: usize) -> Vec<usize> {
        let mut sizes: Vec<usize> = (1..=most.min(512)).map(bucket).collect();
        sizes.dedup();
        sizes
    }
    fn logits_to_host(&self, _: &Counted) -> Done<Vec<f32>> {
        none("logits_to_host")
    }
    fn draws(&self, _: &[Draw]) -> bool {
        true
    }
    fn finish(&self, drawn: Option<(&Counted, &[Draw])>) -> Done<Finished> {
        let drawn = drawn.map_or(Vec::new(), |(logits, draws)| {
            assert_eq!(logits.shape[0], draws.len());
            vec![Some(7); draws.len()]
        });
        Ok(Finished { drawn, times: None })
    }
    fn has_finished(&self, _: &Finished) -> Done<bool> {
        Ok(true)
    }
    fn finished(&self, flight: Finished) -> Done<Finished> {
        Ok(flight)
    }
    fn frequencies(&self, inverse: &[f32], _: &[u32], positions: usize) -> Done<[Counted; 2]> {
        let table = || self.owned(MemoryKind::Weights, &[positions, inverse.len()]);
        Ok([table()?, table()?])
    }
    fn rope_table(&self, frequencies: &[Counted; 2], positions: &Counted) -> Done<RopeTable<Counted>> {
        let table = || self.tensor(&[positions.shape[0] / 3, frequencies[0].shape[1]]);
        Ok(RopeTable { cos: table()?, sin: table()? })
    }
    fn kv_cache(&self, blocks: usize, block_tokens: usize, kv_heads: usize, head_dim: usize) -> Done<Counted> {
        self.owned(MemoryKind::KvPool, &[2, blocks, block_tokens, kv_heads, head_dim])
    }
    fn embed(&self, table: &Counted, ids: &Counted) -> Done<Counted> {
        self.rows_by(ids.shape[0], table)
    }
    fn gather_rows(&self, x: &Counted, rows: &Counted) -> Done<Counted> {
        self.rows_by(rows.shape[0], x)
    }
    fn scatter_rows(&self, x: &Counted, _: &Counted, _: &Counted) -> Done<Counted> {
        self.tensor(&x.shape)
    }
    fn scatter_add_rows(&self, x: &Counted, _: &Counted, _: &Counted) -> Done<Counted> {
        self.tensor(&x.shape)
    }
    fn concat_rows(&self, parts: &[Counted]) -> Done<Counted> {
        self.rows_by(parts.iter().map(|part| part.shape[0]).sum(), &parts[0])
    }
    fn linear(&self, x: &Counted, w: &Counted, _: Option<&Counted>) -> Done<Counted> {
        assert_eq!(x.shape[1], w.shape[1]);
        self.tensor(&[x.shape[0], w.shape[0]])
    }
    fn linear_swiglu(&self, x: &Counted, gate_up: &Counted) -> Done<Counted> {
        let out = self.tensor(&[x.shape[0], gate_up.shape[0] / 2])?;
        if x.shape[0] <= FUSED_ROWS {
            return Ok(out);
        }
        drop(out);
        self.swiglu(&self.linear(x, gate_up, None)?)
    }
    fn add(&self, a: &Counted, _: &Counted) -> Done<Counted> {
        self.tensor(&a.shape)
    }
    fn rms_norm(&self, x: &Counted, _: &Counted, _: f32) -> Done<Counted> {
        self.tensor(&x.shape)
    }
    fn add_rms_norm(&self, x: &Counted, _: &Counted, _: &Counted, _: f32) -> Done<(Counted, Counted)> {
        Ok((self.tensor(&x.shape)?, self.tensor(&x.shape)?))
    }
    fn layer_norm(&self, x: &Counted, _: &Counted, _: &Counted, _: f32) -> Done<Counted> {
        self.tensor(&x.shape)
    }
    fn add_layer_norm(&self, _: &Counted, x: &Counted, _: &Counted, _: &Counted, _: f32) -> Done<(Counted, Counted)> {
        Ok((self.tensor(&x.shape)?, self.tensor(&x.shape)?))
    }
    fn row_range(&self, x: &Counted, rows: Range<usize>) -> Done<Counted> {
        Ok(Counted { shape: [&[rows.len()], &x.shape[1..]].concat(), ..x.clone() })
    }
    fn swiglu(&self, gate_up: &Counted) -> Done<Counted> {
        self.tensor(&[gate_up.shape[0], gate_up.shape[1] / 2])
    }
    fn gelu(&self, x: &Counted, _: GeluKind) -> Done<Counted> {
        self.tensor(&x.shape)
    }
    fn qkv_norm_rope_cache_write(
        &self,
        qkv: &Counted,
        _: &Counted,
        _: &Counted,
        _: f32,
        _: &RopeTable<Counted>,
        _: &Counted,
        cache: &mut Counted,
    ) -> Done<Counted> {
        let [kv_heads, dim] = [cache.shape[3], cache.shape[4]];
        self.tensor(&[qkv.shape[0], qkv.shape[1] - 2 * kv_heads * dim])
    }
    fn paged_attention(&self, q: &Counted, _: &Counted, _: &Counted, _: f32) -> Done<Counted> {
        self.tensor(&q.shape)
    }
    fn geometry(&self, grids: &PatchGrids, inverse: &[f32], segments: Segments) -> Done<[Counted; 5]> {
        let tiles = segments.start.windows(2).map(|pair| (pair[1] - pair[0]).div_ceil(64) as usize).sum::<usize>();
        let patches = segments.start.last().map_or(0, |end| *end as usize);
        let list = |words: usize| self.piece(&[words], 4);
        let angles = patches * 2 * inverse.len();
        let of_grids = list(3 * grids.sizes.len() + 2 + inverse.len())?;
        Ok([of_grids, list(segments.start.len())?, list(2 * tiles)?, list(angles)?, list(angles)?])
    }
    fn segment_attention(&self, qkv: &Counted, _: usize, _: &[Counted; 5], _: f32) -> Done<Counted> {
        let (rows, width) = (qkv.shape[0], qkv.shape[1]);
        let out = self.tensor(&[rows, width / 3])?;
        drop(self.tensor(&[rows, width / 3 * 2])?);
        Ok(out)
    }
    fn interpolate_grids(&self, table: &Counted, geometry: &[Counted; 5]) -> Done<Counted> {
        // cos: two halves of half a head of 64 elements for each patch.
        self.rows_by(geometry[3].shape[0] / HALF_HEAD, table)
    }
    fn router_softmax(&self, _: &Counted, _: &Counted, _: usize, _: bool) -> Done<()> {
        none("router_softmax")
    }
    fn router_sigmoid(&self, _: &Counted, _: &Counted, _: &Counted, _: SigmoidChoice) -> Done<()> {
        none("router_sigmoid")
    }
    fn routing_to_host(&self, (): &()) -> Done<(Vec<u32>, Vec<f32>)> {
        none("routing_to_host")
    }
    fn moe_experts(&self, _: &Counted, _: &Counted, _: &Counted, (): &()) -> Done<Counted> {
        none("moe_experts")
    }
    fn mla_cache(&self, _: usize, _: usize, _: usize, _: usize) -> Done<Counted> {
        none("mla_cache")
    }
    fn mla_norm_rope_cache_write(
        &self,
        _: &Counted,
        _: &Counted,
        _: &Counted,
        _: f32,
        _: usize,
        _: &RopeTable<Counted>,
        _: &Counted,
        _: &mut Counted,
    ) -> Done<Counted> {
        none("mla_norm_rope_cache_write")
    }
    fn mla_attention(&self, _: &Counted, _: &Counted, _: usize, _: &Counted, _: &Counted, _: f32) -> Done<Counted> {
        none("mla_attention")
    }
}
