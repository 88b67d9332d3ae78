//! Grids to learn from: first all sizes, then the ids, block by block.

use being_vl_core::{Interrupt, Trainer};
use numpy::{PyUntypedArray, PyUntypedArrayMethods};
use pyo3::prelude::*;
use pyo3::types::{PyList, PyTuple};

use crate::arrays::{
    Block, BlockReader, GridStack, Size, copy_counts, grid_array, grid_iterator, grid_stack, integers, shape,
};
use crate::errors::GridError;
use crate::work::stream;

/// Where grids come from.
pub(crate) enum Corpus<'py> {
    /// One array.
    Stack(GridStack<'py>),
    /// (H, W) arrays.
    Grids(Vec<Bound<'py, PyUntypedArray>>),
    /// A sequence of (ids of many grids, their heights, their widths).
    Stacks(Bound<'py, PyAny>),
}

impl<'py> Corpus<'py> {
    pub fn new(input: &Bound<'py, PyAny>) -> PyResult<Self> {
        if let Ok(blocks) = input.getattr("blocks") {
            return Ok(Self::Stacks(blocks.call0()?));
        }
        if let Some(stack) = grid_stack(input)? {
            return Ok(Self::Stack(stack));
        }
        let grids: PyResult<_> =
            grid_iterator(input)?.enumerate().map(|(index, item)| grid_array(&item?, index)).collect();
        Ok(Self::Grids(grids?))
    }

    /// (height, width) of every grid.
    pub fn sizes(&self) -> PyResult<Vec<Size>> {
        match self {
            Self::Stack(stack) => Ok(stack.sizes().to_vec()),
            Self::Grids(grids) => Ok(grids.iter().map(|grid| (grid.shape()[0], grid.shape()[1])).collect()),
            Self::Stacks(stacks) => {
                let mut sizes = Vec::new();
                for number in 0..stacks.len()? {
                    sizes.extend_from_slice(read_stack(stacks, number, 0)?.sizes());
                }
                Ok(sizes)
            }
        }
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
            Self::Stacks(stacks) => CorpusReader::Stacks { stacks, next: 0, first: 0, stack: None },
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
        let (stacks, next, first, stack) = match self {
            Self::Blocks(blocks) => return blocks.next(),
            Self::Stacks { stacks, next, first, stack } => (stacks, next, first, stack),
        };
        loop {
            if let Some(block) = stack.as_mut().map_or(Ok(None), GridStack::next)? {
                *first = block.end();
                return Ok(Some(block));
            }
            if *next == stacks.len()? {
                return Ok(None);
            }
            *stack = Some(read_stack(stacks, *next, *first)?);
            *next += 1;
        }
    }
}

/// One of the stacks (ids, heights, widths) as grids in raster order, one after the other.
fn read_stack<'py>(stacks: &Bound<'py, PyAny>, number: usize, first: usize) -> PyResult<GridStack<'py>> {
    let stack = stacks.get_item(number)?.cast_into::<PyTuple>()?;
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
    Ok(GridStack::new(ids, sizes.collect(), first))
}
