//! Grids of VQ ids, offsets between cells, and the regions that tokens cover.

use crate::error::{Error, Result};
use crate::limits::{MAX_CELLS, MAX_SIDE};

/// Where a region's anchor lies as seen from another anchor. Offsets are ordered by rows, then by columns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Offset {
    /// Rows down.
    pub dy: i32,
    /// Columns to the right.
    pub dx: i32,
}

/// One image as a grid of VQ ids in raster order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grid {
    height: u32,
    width: u32,
    ids: Vec<u32>,
    max_id: u32,
}

impl Grid {
    /// A grid of `height * width` ids in raster order. `index` is its place in the input, for the error messages.
    ///
    /// # Errors
    /// [`Error::GridSize`] or [`Error::GridLength`] if there is no such grid.
    pub fn new(index: usize, height: usize, width: usize, ids: Vec<u32>) -> Result<Self> {
        check_size(index, height, width)?;
        if ids.len() != height * width {
            return Err(Error::GridLength { grid: index, height, width, length: ids.len() });
        }
        let max_id = ids.iter().copied().max().unwrap_or(0);
        Ok(Self { height: height as u32, width: width as u32, ids, max_id })
    }

    /// Number of rows.
    #[must_use]
    pub fn height(&self) -> u32 {
        self.height
    }

    /// Number of columns.
    #[must_use]
    pub fn width(&self) -> u32 {
        self.width
    }

    /// The ids in raster order.
    #[must_use]
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// Makes sure that every id is in a codebook of `base_vocab_size` ids.
    ///
    /// # Errors
    /// [`Error::GridId`] naming the first id that is not.
    pub fn check_ids(&self, index: usize, base_vocab_size: u32) -> Result<()> {
        if self.max_id < base_vocab_size {
            return Ok(());
        }
        let position = self.ids.iter().position(|&id| id >= base_vocab_size).unwrap_or(0);
        let width = self.width as usize;
        Err(Error::GridId {
            grid: index,
            row: position / width,
            column: position % width,
            id: self.ids[position].into(),
            base_vocab_size,
        })
    }
}

/// Which token covers which cell, in raster order of cells.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Regions {
    /// Per cell, the index of its token in the output sequence.
    pub tokens: Vec<u32>,
    /// Per cell, which of its token's leaves it is. A token's leaves are its codebook ids: those of `a`, then those of
    /// `b`.
    pub leaves: Vec<u32>,
}

/// Makes sure that a grid may have this size.
///
/// # Errors
/// [`Error::GridSize`] if it may not.
pub fn check_size(index: usize, height: usize, width: usize) -> Result<()> {
    let sides = 1..=MAX_SIDE;
    if sides.contains(&height) && sides.contains(&width) && height * width <= MAX_CELLS {
        Ok(())
    } else {
        Err(Error::GridSize { grid: index, height, width })
    }
}
