//! The class `Vocabulary`.

use std::sync::Mutex;
use std::time::Instant;

use being_vl_core::{
    Dropout, EncodeOptions, EncodedBatch, Encoder, Interrupt, Merge, MergeMode, Progress, Quantizer, Regions,
    TrainOptions, Trainer, memory,
};
use numpy::{PyArray1, PyArray2, PyArrayMethods};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::arrays::{self, Block, Size};
use crate::corpus::Corpus;
use crate::errors::{BeingVLError, to_python};
use crate::work;

/// (token of each cell, leaf of each cell), as (H, W) arrays.
type RegionArrays<'py> = (Bound<'py, PyArray2<i32>>, Bound<'py, PyArray2<i32>>);
type EncodedGrid<'py> = (Bound<'py, PyArray1<u32>>, Option<RegionArrays<'py>>);
type EncodedGrids<'py> =
    (Bound<'py, PyArray1<u32>>, Bound<'py, PyArray1<i64>>, Option<Vec<RegionArrays<'py>>>);
type MergeTuple = (u32, u32, Option<i32>, Option<i32>, u64, u64, f64);

/// A learned vocabulary.
#[pyclass(frozen, module = "being_vl._core")]
pub(crate) struct Vocabulary {
    core: being_vl_core::Vocabulary,
    encoder: Encoder,
}

impl Vocabulary {
    fn new(core: being_vl_core::Vocabulary) -> PyResult<Self> {
        let encoder = Encoder::new(&core).map_err(|error| to_python(&error))?;
        Ok(Self { core, encoder })
    }

    /// What a trainer has learned so far.
    fn of(trainer: &Trainer) -> PyResult<Self> {
        Self::new(trainer.vocabulary().map_err(|error| to_python(&error))?)
    }
}

fn parse_merge_mode(name: &str) -> PyResult<MergeMode> {
    match name {
        "pair" => Ok(MergeMode::Pair),
        "oriented" => Ok(MergeMode::Oriented),
        _ => Err(BeingVLError::new_err(format!("merge_mode = {name:?}: expected 'pair' or 'oriented'"))),
    }
}

#[pymethods]
impl Vocabulary {
    /// Learn a vocabulary from grids.
    #[staticmethod]
    #[pyo3(signature = (grids, *, base_vocab_size, num_merges, merge_mode, alpha, sigma, min_frequency, num_threads,
        progress, resume, checkpoint, checkpoint_every, quantizer_name, quantizer_fingerprint))]
    #[expect(clippy::too_many_arguments, reason = "they are keywords in Python")]
    fn train(
        grids: &Bound<'_, PyAny>,
        base_vocab_size: u32,
        num_merges: usize,
        merge_mode: &str,
        alpha: f64,
        sigma: f64,
        min_frequency: u64,
        num_threads: usize,
        progress: Option<&Bound<'_, PyAny>>,
        resume: Option<&Bound<'_, Self>>,
        checkpoint: Option<&Bound<'_, PyAny>>,
        checkpoint_every: usize,
        quantizer_name: Option<String>,
        quantizer_fingerprint: Option<String>,
    ) -> PyResult<Self> {
        let py = grids.py();
        let start = Instant::now();
        let options = TrainOptions {
            base_vocab_size,
            num_merges,
            merge_mode: parse_merge_mode(merge_mode)?,
            alpha,
            sigma,
            min_frequency,
            num_threads,
            quantizer: Quantizer { name: quantizer_name, fingerprint: quantizer_fingerprint },
            ..TrainOptions::default()
        };
        let resume = resume.map(|vocabulary| &vocabulary.get().core);
        let learn = || {
            let corpus = Corpus::new(grids)?;
            let sizes = corpus.sizes()?;
            let mut trainer = Trainer::new(&sizes, options, resume).map_err(|error| to_python(&error))?;
            corpus.fill(&trainer, sizes.len(), base_vocab_size, num_threads, py)?;
            learn_in_steps(&mut trainer, num_merges, progress, checkpoint, checkpoint_every, start, py)?;
            Self::of(&trainer)
        };
        let result = learn();
        py.detach(memory::give_back);
        result
    }

    /// Read the content of a vocabulary file.
    #[staticmethod]
    #[pyo3(signature = (text, /))]
    fn from_json(text: &str) -> PyResult<Self> {
        let core = being_vl_core::Vocabulary::from_json(text).map_err(|error| to_python(&error))?;
        Self::new(core)
    }

    /// The content of the vocabulary file.
    fn to_json(&self) -> PyResult<String> {
        self.core.to_json().map_err(|error| to_python(&error))
    }

    /// Encode one grid to (ids, None), or to (ids, (token of each cell, leaf of each cell)).
    #[pyo3(signature = (grid, *, regions, dropout, seed))]
    fn encode<'py>(
        &self,
        grid: &Bound<'py, PyAny>,
        regions: bool,
        dropout: f64,
        seed: u64,
    ) -> PyResult<EncodedGrid<'py>> {
        let py = grid.py();
        let options = encode_options(regions, dropout, seed);
        let block = arrays::copy_grid(grid)?;
        let encode = |interrupt: &Interrupt| self.encode_block(&block, &options, interrupt);
        let EncodedBatch { values, regions, .. } = without_gil(py, block.cells(), encode)?;
        let mut regions =
            block.sizes().iter().zip(regions).map(|(&size, regions)| region_arrays(py, size, regions));
        Ok((PyArray1::from_vec(py, values), regions.next().transpose()?))
    }

    /// Encode many grids to (values, offsets, regions of each grid or None).
    #[pyo3(signature = (grids, *, num_threads, regions, dropout, seed))]
    fn encode_batch<'py>(
        &self,
        grids: &Bound<'py, PyAny>,
        num_threads: usize,
        regions: bool,
        dropout: f64,
        seed: u64,
    ) -> PyResult<EncodedGrids<'py>> {
        let py = grids.py();
        let mut blocks = arrays::BlockReader::new(grids)?;
        let mut batch = EncodedBatch::default();
        let mut arrays_of_grids = Vec::new();
        let encode = |block: Block, interrupt: &Interrupt| {
            // Grid i of the batch is grid i - first of this block.
            let options = encode_options(regions, dropout, seed.wrapping_add(block.first as u64));
            let encodings = self.encode_block(&block, &options, interrupt)?;
            Ok((block, encodings))
        };
        let gather = |(block, mut encodings): (Block, EncodedBatch)| {
            for (&size, regions) in block.sizes().iter().zip(std::mem::take(&mut encodings.regions)) {
                let arrays = region_arrays(py, size, regions)?;
                memory::push(&mut arrays_of_grids, arrays, "the regions")
                    .map_err(|error| to_python(&error))?;
            }
            batch.append(encodings).map_err(|error| to_python(&error))
        };
        work::stream(py, num_threads, || blocks.next(), Block::cells, encode, gather)?;
        let offsets = std::iter::once(0).chain(batch.lengths.iter().scan(0, |end, &length| {
            *end += length as i64;
            Some(*end)
        }));
        let offsets = memory::collect(offsets, "the offsets").map_err(|error| to_python(&error))?;
        let offsets = PyArray1::from_vec(py, offsets);
        Ok((PyArray1::from_vec(py, batch.values), offsets, regions.then_some(arrays_of_grids)))
    }

    /// The (height, width) grid that became these tokens.
    #[pyo3(signature = (ids, height, width, *, regions))]
    fn decode<'py>(
        &self,
        ids: &Bound<'py, PyAny>,
        height: usize,
        width: usize,
        regions: Option<(Bound<'py, PyAny>, Bound<'py, PyAny>)>,
    ) -> PyResult<Bound<'py, PyArray2<u32>>> {
        let py = ids.py();
        let ids = arrays::copy_tokens(ids, &self.core)?;
        let regions = regions
            .map(|(tokens, leaves)| {
                let tokens = arrays::copy_counts(&tokens, "regions", &[height, width])?;
                let leaves = arrays::copy_counts(&leaves, "regions.leaves", &[height, width])?;
                Ok::<_, PyErr>(Regions { tokens, leaves })
            })
            .transpose()?;
        let decode = || self.core.decode(&ids, height, width, regions.as_ref());
        let grid = py.detach(decode).map_err(|error| to_python(&error))?;
        PyArray1::from_vec(py, grid).reshape([height, width])
    }

    /// The cells of a token as a list of (dy, dx, id).
    #[pyo3(signature = (token, /))]
    fn token_to_cells(&self, token: u32) -> PyResult<Vec<(i32, i32, u32)>> {
        let cells = self.core.token_to_cells(token).map_err(|error| to_python(&error))?;
        let cells = cells.into_iter().map(|(offset, id)| (offset.dy, offset.dx, id));
        memory::collect(cells, "the cells of a token").map_err(|error| to_python(&error))
    }

    /// Per merge: a, b, dy and dx (None in pair mode), and its statistics n, `n_offset`, s.
    fn merges(&self) -> PyResult<Vec<MergeTuple>> {
        let tuple = |merge: &Merge| {
            let (dy, dx) = merge.offset.map(|offset| (offset.dy, offset.dx)).unzip();
            (merge.a, merge.b, dy, dx, merge.count, merge.offset_count, merge.consistency)
        };
        memory::collect(self.core.merges().iter().map(tuple), "the merges").map_err(|error| to_python(&error))
    }

    /// Per size of the training grids: height, width, number of grids.
    fn grid_sizes(&self) -> Vec<(u32, u32, u64)> {
        self.core.grid_sizes().iter().map(|size| (size.height, size.width, size.grids)).collect()
    }

    #[getter]
    fn base_vocab_size(&self) -> u32 {
        self.core.base_vocab_size()
    }

    #[getter]
    fn num_merges(&self) -> usize {
        self.core.merges().len()
    }

    #[getter]
    fn merge_mode(&self) -> &'static str {
        match self.core.merge_mode() {
            MergeMode::Pair => "pair",
            MergeMode::Oriented => "oriented",
        }
    }

    #[getter]
    fn alpha(&self) -> f64 {
        self.core.alpha()
    }

    #[getter]
    fn sigma(&self) -> f64 {
        self.core.sigma()
    }

    #[getter]
    fn min_frequency(&self) -> u64 {
        self.core.min_frequency()
    }

    #[getter]
    fn quantizer_name(&self) -> Option<&str> {
        self.core.quantizer().name.as_deref()
    }

    #[getter]
    fn quantizer_fingerprint(&self) -> Option<&str> {
        self.core.quantizer().fingerprint.as_deref()
    }

    fn __eq__(&self, other: &Self) -> bool {
        self.core == other.core
    }
}

impl Vocabulary {
    /// Encodes a block on this thread.
    fn encode_block(
        &self,
        block: &Block,
        options: &EncodeOptions,
        interrupt: &Interrupt,
    ) -> being_vl_core::Result<EncodedBatch> {
        let grids = block.grids(self.core.base_vocab_size())?;
        self.encoder.encode_batch(&grids, options, 1, interrupt)
    }
}

/// Learns all merges: reports progress at every tick, and saves after every `checkpoint_every` merges.
fn learn_in_steps(
    trainer: &mut Trainer,
    num_merges: usize,
    progress: Option<&Bound<'_, PyAny>>,
    checkpoint: Option<&Bound<'_, PyAny>>,
    checkpoint_every: usize,
    start: Instant,
    py: Python<'_>,
) -> PyResult<()> {
    // The training thread leaves its progress here; the calling thread passes it to Python at the next tick.
    let mailbox = Mutex::new(None);
    let callback = progress.map(|progress| progress.clone().unbind());
    let report_progress = |py: Python<'_>| {
        let Some(callback) = &callback else { return Ok(()) };
        let progress = mailbox.lock().ok().and_then(|mut mailbox| mailbox.take());
        progress
            .map_or(Ok(()), |progress| callback.call1(py, (progress_dict(py, &progress, start)?,)).map(drop))
    };
    let store_progress = |progress: Progress| {
        if let Ok(mut mailbox) = mailbox.lock() {
            *mailbox = Some(progress);
        }
    };
    let save = |trainer: &Trainer| match checkpoint {
        Some(checkpoint) => checkpoint.call1((Vocabulary::of(trainer)?,)).map(drop),
        None => Ok(()),
    };
    loop {
        let num_before = trainer.num_merges();
        let limit = if checkpoint.is_some() { num_before + checkpoint_every } else { num_merges };
        let result =
            work::run(py, |interrupt| trainer.run(limit, store_progress, interrupt), report_progress);
        let result = result.and_then(|()| report_progress(py));
        if result.is_err() || trainer.num_merges() > num_before {
            // If both fail, the error of training is raised, not that of saving.
            let save_result = save(trainer);
            result.and(save_result)?;
        }
        if trainer.num_merges() < limit || trainer.num_merges() == num_merges {
            return Ok(());
        }
    }
}

/// Does work on `cells` cells while other Python threads go on; listens for Ctrl-C if the cells are many.
fn without_gil<T: Send>(
    py: Python<'_>,
    cells: usize,
    work: impl FnOnce(&Interrupt) -> being_vl_core::Result<T> + Send,
) -> PyResult<T> {
    if cells < work::MIN_THREAD_CELLS {
        py.detach(|| work(&Interrupt::default())).map_err(|error| to_python(&error))
    } else {
        work::run(py, work, |_| Ok(()))
    }
}

/// The cells' tokens and leaves as (H, W) arrays.
fn region_arrays(py: Python<'_>, (height, width): Size, regions: Regions) -> PyResult<RegionArrays<'_>> {
    // A grid has fewer than 2^31 cells.
    let to_array = |counts: Vec<u32>| {
        let counts = counts.into_iter().map(u32::cast_signed).collect();
        PyArray1::<i32>::from_vec(py, counts).reshape([height, width])
    };
    Ok((to_array(regions.tokens)?, to_array(regions.leaves)?))
}

fn encode_options(regions: bool, probability: f64, seed: u64) -> EncodeOptions {
    // The core refuses NaN.
    let dropout = (probability != 0.0).then_some(Dropout { probability, seed });
    EncodeOptions { dropout, regions }
}

/// The argument of the progress callback.
fn progress_dict<'py>(py: Python<'py>, progress: &Progress, start: Instant) -> PyResult<Bound<'py, PyDict>> {
    let Progress { merges, num_merges, merge, cells, tokens } = *progress;
    let dict = PyDict::new(py);
    dict.set_item("done", merges)?;
    dict.set_item("total", num_merges)?;
    dict.set_item("a", merge.a)?;
    dict.set_item("b", merge.b)?;
    dict.set_item("dy", merge.offset.map(|offset| offset.dy))?;
    dict.set_item("dx", merge.offset.map(|offset| offset.dx))?;
    dict.set_item("n", merge.count)?;
    dict.set_item("n_offset", merge.offset_count)?;
    dict.set_item("s", merge.consistency)?;
    dict.set_item("cells", cells)?;
    dict.set_item("tokens", tokens)?;
    dict.set_item("elapsed", start.elapsed().as_secs_f64())?;
    Ok(dict)
}
