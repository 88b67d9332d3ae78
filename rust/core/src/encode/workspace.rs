//! The memory for one grid while it is encoded, kept from grid to grid.
//!
//! Cells lie row after row with border cells around them, so a position is one number, positions are in raster order,
//! and every cell has four neighbours without a test for edges.
//!
//! In pair mode every cell knows its region's token and anchor, and a region's cells form a ring. In oriented mode the
//! other region can only lie in one place, so tokens stand at anchors alone and nothing else is kept.

use super::merges::{Direction, MergeIndex};
use crate::error::Result;
use crate::grid::{Grid, Regions};
use crate::interrupt::Interrupt;
use crate::memory;

/// The token where no region is: on the border, and in oriented mode wherever no anchor is.
pub(super) const NO_TOKEN: u32 = u32::MAX;

/// Marks the end of a list.
pub(super) const END: u32 = u32::MAX;

/// What memory is for, in messages.
const WORKSPACE: &str = "a grid while it is encoded";

/// What encoding a grid needs, kept from grid to grid.
#[derive(Debug, Default)]
pub(super) struct Workspace {
    pub height: usize,
    pub width: usize,
    pub stride: usize,
    pub oriented: bool,
    /// Per position, the token at the start, and in oriented mode the token of the region that has its anchor there.
    pub tokens: Vec<u32>,
    /// Per position, its region's token and anchor, packed (pair mode).
    pub cells: Vec<u64>,
    /// Per position in a region of several cells, the next of them (pair mode).
    pub next_in_ring: Vec<u32>,
    /// Per position, which of its region's leaves it is (pair mode, only if regions are asked for).
    pub leaves: Vec<u32>,
    /// One bit per merge that may match. All 0 between grids.
    pub pending_merges: Vec<u64>,
    /// Per merge of two single cells, the first of its cell pairs, or `END`. All `END` between grids. A cell pair is
    /// twice the position of a cell, plus 0 for it and the cell at its right, 1 for it and the cell below.
    pub first_cell_pair: Vec<u32>,
    /// Per cell pair, the next one of its merge, or `END`.
    pub next_cell_pair: Vec<u32>,
    /// The first `num_anchors` are the anchors of the regions that merges have made, merge after merge, in raster order
    /// for each.
    pub anchors: Vec<u32>,
    pub num_anchors: usize,
    /// Per merge that has made regions in this grid, the first of its `anchors` and their number.
    pub anchors_of_merge: Vec<(u32, u32)>,
    /// The first `num_pairs` are pairs of anchors that the current merge may join.
    pub pairs: Vec<u64>,
    pub num_pairs: usize,
}

/// Two anchors, or a region's token and anchor, as one number. Numbers are in order of the first, then of the second.
pub(super) fn pack(x: u32, y: u32) -> u64 {
    u64::from(x) << 32 | u64::from(y)
}

pub(super) fn unpack(packed: u64) -> (u32, u32) {
    ((packed >> 32) as u32, packed as u32)
}

/// The positions of the two cells of a cell pair.
pub(super) fn cell_pair_positions(cell_pair: u32, stride: usize) -> (usize, usize) {
    let x = (cell_pair / 2) as usize;
    (x, x + if cell_pair.is_multiple_of(2) { 1 } else { stride })
}

pub(super) fn set_bit(bits: &mut [u64], index: u32) {
    bits[index as usize / 64] |= 1 << (index % 64);
}

/// Makes a list long enough for `len` items, which then can be written without growing it one by one.
#[inline]
pub(super) fn ensure_len<T: Copy + Default>(list: &mut Vec<T>, len: usize) -> Result<()> {
    if len <= list.len() {
        return Ok(());
    }
    memory::resize(list, len.next_power_of_two(), T::default(), WORKSPACE)
}

impl Workspace {
    /// Number of positions that memory is held for.
    pub fn capacity(&self) -> usize {
        self.tokens.capacity()
    }

    /// Starts with a grid, every cell a region of its own.
    pub fn load_grid<const ORIENTED: bool>(
        &mut self,
        merges: &MergeIndex,
        grid: &Grid,
        regions: bool,
    ) -> Result<()> {
        let (height, width) = (grid.height() as usize, grid.width() as usize);
        // Oriented mode: the border is as wide as the grid, so that no offset leads from a cell into another row.
        let stride = if ORIENTED { 2 * width } else { width + 1 };
        let positions = (height + 2) * stride;
        // Of a grid of the same size, the border is right already and all else is overwritten.
        if (self.height, self.width, self.oriented) != (height, width, ORIENTED) {
            (self.height, self.width, self.stride, self.oriented) = (height, width, stride, ORIENTED);
            self.tokens.clear();
            memory::resize(&mut self.tokens, positions, NO_TOKEN, WORKSPACE)?;
            self.cells.clear();
            self.next_in_ring.clear();
            if !ORIENTED {
                memory::resize(&mut self.cells, positions, pack(NO_TOKEN, 0), WORKSPACE)?;
                memory::resize(&mut self.next_in_ring, positions, 0, WORKSPACE)?;
            }
            memory::resize(&mut self.next_cell_pair, 2 * positions, END, WORKSPACE)?;
            // Each merge makes one region of two, so fewer are made than there are cells.
            memory::resize(&mut self.anchors, height * width, 0, WORKSPACE)?;
        }
        self.leaves.clear();
        memory::resize(&mut self.leaves, if regions && !ORIENTED { positions } else { 0 }, 0, WORKSPACE)?;
        if self.first_cell_pair.len() < merges.len() {
            memory::resize(&mut self.first_cell_pair, merges.len(), END, WORKSPACE)?;
            memory::resize(&mut self.anchors_of_merge, merges.len(), (0, 0), WORKSPACE)?;
            memory::resize(&mut self.pending_merges, merges.len().div_ceil(64), 0, WORKSPACE)?;
        }
        self.num_anchors = 0;
        for (row, ids) in (1..).zip(grid.ids().chunks_exact(width)) {
            let row = row * stride..row * stride + width;
            self.tokens[row.clone()].copy_from_slice(ids);
            if !ORIENTED {
                for ((cell, &id), position) in
                    self.cells[row.clone()].iter_mut().zip(ids).zip(row.start as u32..)
                {
                    *cell = pack(id, position);
                }
            }
        }
        Ok(())
    }

    /// Lists the neighbouring cells that some merge joins, and makes those merges pending.
    pub fn list_cell_pairs(&mut self, merges: &MergeIndex, interrupt: &Interrupt) -> Result<()> {
        let table = merges.cell_merges();
        let (stride, width) = (self.stride, self.width);
        let tokens = self.tokens.as_slice();
        // Backwards, since each pair is put in front of its list.
        for row in (1..=self.height).rev().map(|row| row * stride) {
            interrupt.check()?;
            for start in (0..width).step_by(32).rev().map(|column| row + column) {
                let end = (start + 32).min(row + width);
                let (right, below) = (&tokens[start + 1..=end], &tokens[start + stride..end + stride]);
                // First the filter, branchless (see train/mod.rs): two bits for each of 32 cells.
                let mut candidates = 0;
                for ((&a, &right), &below) in tokens[start..end].iter().zip(right).zip(below) {
                    candidates = candidates << 1 | table.may_contain(a, right, Direction::Right);
                    candidates = candidates << 1 | table.may_contain(a, below, Direction::Below);
                }
                // Then the table, for the few that pass the filter.
                while candidates != 0 {
                    let cell_pair = 2 * end as u32 - 1 - candidates.trailing_zeros();
                    candidates &= candidates - 1;
                    let (x, y) = cell_pair_positions(cell_pair, stride);
                    let direction =
                        if cell_pair.is_multiple_of(2) { Direction::Right } else { Direction::Below };
                    if let Some(merge) = table.get(tokens[x], tokens[y], direction) {
                        let next = std::mem::replace(&mut self.first_cell_pair[merge as usize], cell_pair);
                        self.next_cell_pair[cell_pair as usize] = next;
                        set_bit(&mut self.pending_merges, merge);
                    }
                }
            }
        }
        Ok(())
    }

    fn is_anchor<const ORIENTED: bool>(&self, position: usize) -> bool {
        if ORIENTED {
            self.tokens[position] != NO_TOKEN
        } else {
            self.cells[position] as u32 == position as u32
        }
    }

    /// The positions of the cells, in raster order.
    fn positions(&self) -> impl Iterator<Item = usize> + use<> {
        let (width, stride) = (self.width, self.stride);
        (1..=self.height).flat_map(move |row| row * stride..row * stride + width)
    }

    /// Appends the tokens, in raster order of anchors. Branchless: every cell is written, and counted if it is an
    /// anchor.
    pub fn append_tokens<const ORIENTED: bool>(&self, values: &mut Vec<u32>) -> Result<()> {
        let start = values.len();
        memory::resize(values, start + self.height * self.width, 0, "the tokens of the grids")?;
        let output = &mut values[start..];
        let mut n = 0;
        for row in (1..=self.height).map(|row| row * self.stride) {
            if ORIENTED {
                for &token in &self.tokens[row..row + self.width] {
                    output[n] = token;
                    n += usize::from(token != NO_TOKEN);
                }
            } else {
                for (&cell, position) in self.cells[row..row + self.width].iter().zip(row as u32..) {
                    let (token, anchor) = unpack(cell);
                    output[n] = token;
                    n += usize::from(anchor == position);
                }
            }
        }
        values.truncate(start + n);
        Ok(())
    }

    /// Which of these tokens, the grid's own, covers which cell.
    pub fn regions<const ORIENTED: bool>(&self, merges: &MergeIndex, ids: &[u32]) -> Result<Regions> {
        const REGIONS: &str = "the regions of a grid";
        let cells = self.height * self.width;
        let anchors = (0..).zip(self.positions().filter(|&position| self.is_anchor::<ORIENTED>(position)));
        if ORIENTED {
            // A token's shape says which cells it covers.
            let (tokens, leaves) = (memory::zeros(cells, REGIONS)?, memory::zeros(cells, REGIONS)?);
            let mut regions = Regions { tokens, leaves };
            for ((index, anchor), &token) in anchors.zip(ids) {
                let (row, column) = (anchor / self.stride - 1, anchor % self.stride);
                for (leaf, offset) in (0..).zip(merges.cells(token)) {
                    let cell = (row + offset.dy as usize) * self.width;
                    let cell = (cell + column).wrapping_add_signed(offset.dx as isize);
                    regions.tokens[cell] = index;
                    regions.leaves[cell] = leaf;
                }
            }
            Ok(regions)
        } else {
            // Every cell knows its anchor.
            let mut index_at = memory::zeros(self.tokens.len(), REGIONS)?;
            for (index, anchor) in anchors {
                index_at[anchor] = index;
            }
            let mut tokens = memory::with_capacity(cells, REGIONS)?;
            let mut leaves = memory::with_capacity(cells, REGIONS)?;
            let cell = |p: usize| (index_at[unpack(self.cells[p]).1 as usize], self.leaves[p]);
            for (index, leaf) in self.positions().map(cell) {
                tokens.push(index);
                leaves.push(leaf);
            }
            Ok(Regions { tokens, leaves })
        }
    }
}
