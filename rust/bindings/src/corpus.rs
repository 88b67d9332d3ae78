//! Grids to learn from: first all sizes, then the ids, block by block.

use being_vl_core::{Interrupt, Trainer};
use numpy::{PyUntypedArray, PyUntypedArrayMethods};
use pyo3::prelude::*;
use pyo3::types::{PyList, PyTuple};

use crate::arrays::{Block, Blocks, Line, Size, counts, each, integers, plane, shape, stack};
use crate::errors::GridError;
use crate::work::stream;

/// Where grids come from.
pub(crate) enum Corpus<'py> {
    /// One array.
    Stack(Line<'py>),
    /// (H, W) arrays.
    Grids(Vec<Bound<'py, PyUntypedArray>>),
    /// A sequence of (ids of many grids, their heights, their widths).
    Parts(Bound<'py, PyAny>),
}

impl<'py> Corpus<'py> {
    pub fn new(input: &Bound<'py, PyAny>) -> PyResult<Self> {
        if let Ok(blocks) = input.getattr("blocks") {
            return Ok(Self::Parts(blocks.call0()?));
        }
        if let Some(line) = stack(input)? {
            return Ok(Self::Stack(line));
        }
        let grids: PyResult<_> = each(input)?.enumerate().map(|(index, item)| plane(&item?, index)).collect();
        Ok(Self::Grids(grids?))
    }

    /// (height, width) of every grid.
    pub fn sizes(&self) -> PyResult<Vec<Size>> {
        match self {
            Self::Stack(line) => Ok(line.sizes().to_vec()),
            Self::Grids(grids) => Ok(grids.iter().map(|grid| (grid.shape()[0], grid.shape()[1])).collect()),
            Self::Parts(parts) => {
                let mut sizes = Vec::new();
                for number in 0..parts.len()? {
                    sizes.extend_from_slice(part(parts, number, 0)?.sizes());
                }
                Ok(sizes)
            }
        }
    }

    /// Gives all grids to the trainer, which knows the sizes of so many, on so many threads (0: one per core).
    pub fn fill(
        self,
        trainer: &Trainer,
        number: usize,
        base_vocab_size: u32,
        num_threads: usize,
        py: Python<'py>,
    ) -> PyResult<()> {
        let mut blocks = match self {
            Self::Stack(line) => AllBlocks::One(Blocks::Line(line)),
            Self::Grids(grids) => AllBlocks::One(Blocks::Each(PyList::new(py, grids)?.try_iter()?, 0)),
            Self::Parts(parts) => AllBlocks::Parts { parts, next: 0, first: 0, line: None },
        };
        let set = |block: Block, _: &Interrupt| {
            let grids = block.grids(base_vocab_size)?;
            let known = grids.len().min(number.saturating_sub(block.first));
            trainer.set(block.first, &grids[..known])?;
            Ok(block.end())
        };
        let mut filled = 0;
        let note = |end: usize| {
            filled = end;
            Ok(())
        };
        stream(py, num_threads, || blocks.next(), Block::cells, set, note)?;
        if filled == number {
            return Ok(());
        }
        let message =
            format!("the blocks had {number} grids when they were read first, and have {filled} now");
        Err(GridError::new_err(message))
    }
}

/// The blocks of a corpus.
enum AllBlocks<'py> {
    One(Blocks<'py>),
    /// Of a sequence of parts, of which `line` is before `next`.
    Parts {
        parts: Bound<'py, PyAny>,
        next: usize,
        first: usize,
        line: Option<Line<'py>>,
    },
}

impl AllBlocks<'_> {
    fn next(&mut self) -> PyResult<Option<Block>> {
        let (parts, next, first, line) = match self {
            Self::One(blocks) => return blocks.next(),
            Self::Parts { parts, next, first, line } => (parts, next, first, line),
        };
        loop {
            if let Some(block) = line.as_mut().map_or(Ok(None), Line::next)? {
                *first = block.end();
                return Ok(Some(block));
            }
            if *next == parts.len()? {
                return Ok(None);
            }
            *line = Some(part(parts, *next, *first)?);
            *next += 1;
        }
    }
}

/// Grids in raster order, one after the other.
fn part<'py>(parts: &Bound<'py, PyAny>, number: usize, first: usize) -> PyResult<Line<'py>> {
    let part = parts.get_item(number)?.cast_into::<PyTuple>()?;
    let [ids, heights, widths] = [("ids", 0), ("heights", 1), ("widths", 2)]
        .map(|(name, place)| integers(&part.get_item(place)?, &format!("{name} of block {number}")));
    let ids = ids?;
    let [heights, widths] = [(heights?, "heights"), (widths?, "widths")]
        .map(|(sides, name)| counts(&sides, &format!("{name} of block {number}"), &[sides.len()]));
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
    Ok(Line::new(ids, sizes.collect(), first))
}
