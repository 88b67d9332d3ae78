//! Grids to learn from, read in place: first all sizes, then the ids of one grid after the other.

use being_vl_core::{Error, Result, Trainer};
use numpy::ndarray::{ArrayViewD, Axis};
use numpy::{PyUntypedArray, PyUntypedArrayMethods};
use pyo3::prelude::*;
use pyo3::types::PyTuple;

use crate::arrays::{self, Visitor, dispatch, integers};
use crate::errors::{GridError, to_python};

/// Where grids come from.
pub(crate) enum Corpus<'py> {
    /// An (N, H, W) array.
    Array(Bound<'py, PyUntypedArray>),
    /// (H, W) arrays.
    Grids(Vec<Bound<'py, PyUntypedArray>>),
    /// A sequence of (ids of many grids, their heights, their widths).
    Blocks(Bound<'py, PyAny>),
}

impl<'py> Corpus<'py> {
    pub fn new(input: &Bound<'py, PyAny>) -> PyResult<Self> {
        if let Ok(blocks) = input.getattr("blocks") {
            return Ok(Self::Blocks(blocks.call0()?));
        }
        if arrays::is_array(input)? {
            let array = integers(input, "grids")?;
            if array.ndim() == 3 {
                return Ok(Self::Array(array));
            }
            if array.ndim() != 1 || array.len() > 0 {
                let shape = arrays::shape(&array);
                let message =
                    format!("expected an (N, H, W) array or a sequence of (H, W) arrays, got {shape}");
                return Err(GridError::new_err(message));
            }
        }
        let mut grids = Vec::new();
        for (index, item) in input.try_iter()?.enumerate() {
            let array = integers(&item?, &format!("grid {index}"))?;
            if array.ndim() != 2 {
                let shape = arrays::shape(&array);
                let message = format!("grid {index}: expected an (H, W) array, got {shape}");
                return Err(GridError::new_err(message));
            }
            grids.push(array);
        }
        Ok(Self::Grids(grids))
    }

    /// (height, width) of every grid.
    pub fn sizes(&self) -> PyResult<Vec<(usize, usize)>> {
        match self {
            Self::Array(array) => Ok(vec![(array.shape()[1], array.shape()[2]); array.shape()[0]]),
            Self::Grids(grids) => Ok(grids.iter().map(|grid| (grid.shape()[0], grid.shape()[1])).collect()),
            Self::Blocks(blocks) => {
                let mut sizes = Vec::new();
                for number in 0..blocks.len()? {
                    sizes.extend(Block::get(blocks, number)?.sizes()?);
                }
                Ok(sizes)
            }
        }
    }

    /// Gives all grids to the trainer, which copies them. Python can change the arrays only between two grids.
    pub fn fill(&self, trainer: &mut Trainer, base_vocab_size: u32) -> PyResult<()> {
        let mut fill = Fill { trainer, base_vocab_size, grid: 0 };
        match self {
            Self::Array(array) => dispatch(array, Stack { fill: &mut fill }),
            Self::Grids(grids) => grids.iter().try_for_each(|grid| {
                let size = (grid.shape()[0], grid.shape()[1]);
                dispatch(grid, Flat { fill: &mut fill, sizes: &[size] })
            }),
            Self::Blocks(blocks) => (0..blocks.len()?).try_for_each(|number| {
                let block = Block::get(blocks, number)?;
                dispatch(&block.ids, Flat { fill: &mut fill, sizes: &block.sizes()? })
            }),
        }
    }
}

struct Block<'py> {
    ids: Bound<'py, PyUntypedArray>,
    heights: Bound<'py, PyUntypedArray>,
    widths: Bound<'py, PyUntypedArray>,
    number: usize,
}

impl<'py> Block<'py> {
    fn get(blocks: &Bound<'py, PyAny>, number: usize) -> PyResult<Self> {
        let block = blocks.get_item(number)?.cast_into::<PyTuple>()?;
        let [ids, heights, widths] = [("ids", 0), ("heights", 1), ("widths", 2)]
            .map(|(name, place)| integers(&block.get_item(place)?, &format!("{name} of block {number}")));
        let block = Self { ids: ids?, heights: heights?, widths: widths?, number };
        if block.ids.ndim() != 1 {
            let shape = arrays::shape(&block.ids);
            return Err(GridError::new_err(format!(
                "ids of block {number}: expected a 1-D array, got {shape}"
            )));
        }
        Ok(block)
    }

    fn sizes(&self) -> PyResult<Vec<(usize, usize)>> {
        let [heights, widths] = [&self.heights, &self.widths].map(|array| arrays::tokens(array.as_any()));
        let (heights, widths) = (heights?, widths?);
        let sizes: Vec<_> = heights
            .into_iter()
            .zip(widths)
            .map(|(height, width)| (height as usize, width as usize))
            .collect();
        let cells: u64 = sizes.iter().map(|&(height, width)| height as u64 * width as u64).sum();
        if self.heights.len() != self.widths.len() || cells != self.ids.len() as u64 {
            return Err(GridError::new_err(format!(
                "block {}: {} heights and {} widths make {cells} cells, and there are {} ids",
                self.number,
                self.heights.len(),
                self.widths.len(),
                self.ids.len(),
            )));
        }
        Ok(sizes)
    }
}

/// Fills grid after grid.
struct Fill<'a> {
    trainer: &'a mut Trainer,
    base_vocab_size: u32,
    grid: usize,
}

impl Fill<'_> {
    fn set<'a, T>(&mut self, py: Python<'_>, ids: impl Iterator<Item = &'a T>, width: usize) -> PyResult<()>
    where
        T: Copy + Into<i128> + TryInto<u32> + 'a,
    {
        if self.grid.is_multiple_of(256) {
            py.check_signals()?;
        }
        let Self { grid, base_vocab_size, .. } = *self;
        let mut copy = |(cell, &value): (usize, &T)| match value.try_into() {
            Ok(id) if id < base_vocab_size => Ok(id),
            _ => {
                let (row, column, id) = (cell / width, cell % width, value.into());
                Err(Error::GridId { grid, row, column, id, base_vocab_size })
            }
        };
        let ids: Result<Vec<u32>> = ids.enumerate().map(&mut copy).collect();
        self.trainer.set(grid, ids.map_err(|error| to_python(&error))?).map_err(|error| to_python(&error))?;
        self.grid += 1;
        Ok(())
    }
}

/// Reads grids that are stacked along the first axis.
struct Stack<'a, 'b> {
    fill: &'a mut Fill<'b>,
}

impl Visitor for Stack<'_, '_> {
    type Output = ();
    fn visit<T: Copy + Into<i128> + TryInto<u32>>(
        self,
        py: Python<'_>,
        view: ArrayViewD<'_, T>,
    ) -> PyResult<()> {
        let width = view.shape()[2];
        view.axis_iter(Axis(0)).try_for_each(|grid| match grid.as_slice() {
            Some(ids) => self.fill.set(py, ids.iter(), width),
            None => self.fill.set(py, grid.iter(), width),
        })
    }
}

/// Reads grids that lie one after the other in raster order.
struct Flat<'a, 'b> {
    fill: &'a mut Fill<'b>,
    sizes: &'a [(usize, usize)],
}

impl Visitor for Flat<'_, '_> {
    type Output = ();
    fn visit<T: Copy + Into<i128> + TryInto<u32>>(
        self,
        py: Python<'_>,
        view: ArrayViewD<'_, T>,
    ) -> PyResult<()> {
        let mut start = 0;
        let mut ids = view.iter();
        self.sizes.iter().try_for_each(|&(height, width)| {
            let end = start + height * width;
            let result = match view.as_slice() {
                Some(slice) => self.fill.set(py, slice[start..end].iter(), width),
                None => self.fill.set(py, ids.by_ref().take(height * width), width),
            };
            start = end;
            result
        })
    }
}
