//! Grids of VQ ids, and offsets between cells.

use crate::error::{Error, Result};

/// The most rows or columns that a grid may have.
pub const MAX_SIDE: usize = 65_535;

/// The most cells that a grid may have, so that positions in it fit 31 bits with borders around it.
pub const MAX_CELLS: usize = 1 << 28;

/// The most tokens (codebook ids and merges) that a vocabulary may have, so that a table with a row per token is of
/// reasonable size even if a file asks for more.
pub const MAX_VOCAB_SIZE: u32 = 1 << 24;

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
    largest: u32,
}

impl Grid {
    /// A grid of `height * width` ids in raster order. `index` is its place in the input, for the error messages.
    ///
    /// # Errors
    /// [`Error::GridSize`] or [`Error::GridLength`] if there is no such grid.
    pub fn new(index: usize, height: usize, width: usize, ids: Vec<u32>) -> Result<Self> {
        check_size(index, height, width)?;
        if ids.len() != height * width {
            return Err(Error::GridLength { grid: index, height, width, found: ids.len() });
        }
        let largest = ids.iter().copied().max().unwrap_or(0);
        Ok(Self { height: height as u32, width: width as u32, ids, largest })
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
        if self.largest < base_vocab_size {
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
