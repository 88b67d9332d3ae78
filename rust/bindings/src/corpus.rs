//! Grids to learn from: first all sizes, then the ids, block by block.

use being_vl_core::{Interrupt, Trainer, memory};
use numpy::{PyUntypedArray, PyUntypedArrayMethods};
use pyo3::exceptions::{PyIndexError, PyTypeError};
use pyo3::prelude::*;
use pyo3::types::{PyList, PyTuple};

use crate::arrays::{
    Block, BlockReader, GridStack, SIZES, Size, copy_counts, grid_array, grid_iterator, grid_stack, integers,
    shape,
};
use crate::errors::{GridError, to_python};
use crate::work::stream;

/// Where grids come from.
pub(crate) enum Corpus<'py> {
    /// One array.
    Stack(GridStack<'py>),
    /// (H, W) arrays.
    Grids(Vec<Bound<'py, PyUntypedArray>>),
    /// A sequence of (ids of many grids, their heights, their widths), and its length.
    Stacks(Bound<'py, PyAny>, usize),
}

impl<'py> Corpus<'py> {
    pub fn new(input: &Bound<'py, PyAny>) -> PyResult<Self> {
        if let Ok(blocks) = input.getattr("blocks") {
            let stacks = blocks.call0()?;
            let number = stacks.len().map_err(|error| blocks_error(&stacks, error))?;
            return Ok(Self::Stacks(stacks, number));
        }
        if let Some(stack) = grid_stack(input)? {
            return Ok(Self::Stack(stack));
        }
        let mut grids = Vec::new();
        for (index, item) in grid_iterator(input)?.enumerate() {
            let grid = grid_array(&item?, index)?;
            memory::push(&mut grids, grid, "the grids").map_err(|error| to_python(&error))?;
        }
        Ok(Self::Grids(grids))
    }

    /// (height, width) of every grid.
    pub fn sizes(&self) -> PyResult<Vec<Size>> {
        let mut sizes = Vec::new();
        let mut extend = |part: &[Size]| {
            memory::extend(&mut sizes, part.iter().copied(), SIZES).map_err(|error| to_python(&error))
        };
        match self {
            Self::Stack(stack) => extend(stack.sizes())?,
            Self::Grids(grids) => {
                for grid in grids {
                    extend(&[(grid.shape()[0], grid.shape()[1])])?;
                }
            }
            Self::Stacks(stacks, number) => {
                for block in 0..*number {
                    check_number(stacks, *number)?;
                    extend(read_stack(stacks, block, 0)?.sizes())?;
                }
            }
        }
        Ok(sizes)
    }

    /// Gives all grids to the trainer, which knows the sizes of `number` grids, on `num_threads` threads (0: one per core).
    pub fn fill(
        self,
        trainer: &Trainer,
        number: usize,
        base_vocab_size: u32,
        num_threads: usize,
        py: Python<'py>,
    ) -> PyResult<()> {
        let mut blocks = match self {
            Self::Stack(stack) => CorpusReader::Blocks(BlockReader::Stack(stack)),
            Self::Grids(grids) => {
                CorpusReader::Blocks(BlockReader::Iterator(PyList::new(py, grids)?.try_iter()?, 0))
            }
            Self::Stacks(stacks, number) => {
                CorpusReader::Stacks { stacks, number, next: 0, first: 0, stack: None }
            }
        };
        let set = |block: Block, _: &Interrupt| {
            let grids = block.grids(base_vocab_size)?;
            // The trainer has no room for grids that were not there when the sizes were read.
            let num_expected = grids.len().min(number.saturating_sub(block.first));
            trainer.set_grids(block.first, &grids[..num_expected])?;
            Ok(block.end())
        };
        let mut num_grids = 0;
        let count = |end: usize| {
            num_grids = end;
            Ok(())
        };
        stream(py, num_threads, || blocks.next(), Block::cells, set, count)?;
        if num_grids == number {
            return Ok(());
        }
        let message =
            format!("the blocks had {number} grids when they were read first, and have {num_grids} now");
        Err(GridError::new_err(message))
    }
}

/// The grids of a corpus, block by block.
enum CorpusReader<'py> {
    Blocks(BlockReader<'py>),
    /// A sequence of stacks.
    Stacks {
        stacks: Bound<'py, PyAny>,
        /// How many they were when they were read first.
        number: usize,
        /// Number of the stack to read next.
        next: usize,
        /// Index of the first grid that has not been read.
        first: usize,
        /// The stack that is being read.
        stack: Option<GridStack<'py>>,
    },
}

impl CorpusReader<'_> {
    fn next(&mut self) -> PyResult<Option<Block>> {
        let (stacks, number, next, first, stack) = match self {
            Self::Blocks(blocks) => return blocks.next(),
            Self::Stacks { stacks, number, next, first, stack } => (stacks, *number, next, first, stack),
        };
        loop {
            if let Some(block) = stack.as_mut().map_or(Ok(None), GridStack::next)? {
                *first = block.end();
                return Ok(Some(block));
            }
            check_number(stacks, number)?;
            if *next == number {
                return Ok(None);
            }
            *stack = Some(read_stack(stacks, *next, *first)?);
            *next += 1;
        }
    }
}

/// The error for what is no sequence of stacks.
fn blocks_error(stacks: &Bound<'_, PyAny>, error: PyErr) -> PyErr {
    if !error.is_instance_of::<PyTypeError>(stacks.py()) {
        return error;
    }
    match stacks.get_type().name() {
        Ok(name) => PyTypeError::new_err(format!(
            "blocks: expected a sequence of (ids, heights, widths), which can be read twice, got {name}"
        )),
        Err(error) => error,
    }
}

/// Makes sure that there are still as many blocks as when they were read first.
fn check_number(stacks: &Bound<'_, PyAny>, number: usize) -> PyResult<()> {
    let len = stacks.len()?;
    if len == number {
        return Ok(());
    }
    let message = format!("there were {number} blocks when they were read first, and there are {len} now");
    Err(GridError::new_err(message))
}

/// One of the stacks (ids, heights, widths) as grids in raster order, one after the other.
fn read_stack<'py>(stacks: &Bound<'py, PyAny>, number: usize, first: usize) -> PyResult<GridStack<'py>> {
    let py = stacks.py();
    let block = stacks.get_item(number).map_err(|error| {
        if error.is_instance_of::<PyIndexError>(py) {
            GridError::new_err(format!(
                "block {number} is not there, although there are more by their length"
            ))
        } else {
            error
        }
    })?;
    let stack = block.cast_into::<PyTuple>().ok().filter(|stack| stack.len() == 3).ok_or_else(|| {
        PyTypeError::new_err(format!("block {number}: expected a tuple (ids, heights, widths)"))
    })?;
    let [ids, heights, widths] = [("ids", 0), ("heights", 1), ("widths", 2)]
        .map(|(name, place)| integers(&stack.get_item(place)?, &format!("{name} of block {number}")));
    let ids = ids?;
    let [heights, widths] = [(heights?, "heights"), (widths?, "widths")]
        .map(|(sides, name)| copy_counts(&sides, &format!("{name} of block {number}"), &[sides.len()]));
    let (heights, widths) = (heights?, widths?);
    if ids.ndim() != 1 {
        let message = format!("ids of block {number}: expected a 1-D array, got {}", shape(&ids));
        return Err(GridError::new_err(message));
    }
    let cells = heights.iter().zip(&widths).map(|(&height, &width)| u64::from(height) * u64::from(width));
    let cells = cells.fold(0, u64::saturating_add);
    if heights.len() != widths.len() || cells != ids.len() as u64 {
        return Err(GridError::new_err(format!(
            "block {number}: {} heights and {} widths make {cells} cells, and there are {} ids",
            heights.len(),
            widths.len(),
            ids.len(),
        )));
    }
    let sizes = heights.into_iter().zip(widths).map(|(height, width)| (height as usize, width as usize));
    let sizes = memory::collect(sizes, SIZES).map_err(|error| to_python(&error))?;
    Ok(GridStack::new(ids, sizes, first))
}
