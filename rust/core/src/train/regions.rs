//! The cells of many grids and the regions they form.
//!
//! Grids lie one below the other, with a column of border cells at the right of every row and a row of them above and
//! below every grid. So every cell has four neighbours without a test for edges, a position is one number, and
//! positions of one grid are in raster order.

use std::ops::Range;

use super::neighbours::{Neighbour, Neighbours};
use super::occurrences::unpack;
use super::word::{Word, has_anchor, region_at};
use crate::error::Result;
use crate::grid::Offset;
use crate::memory::{self, prefetch};

/// Grids of one width, one below the other.
#[derive(Debug, Clone, Copy)]
struct Stack {
    start: u32,
    stride: u32,
    /// 2^64 / stride, rounded up.
    inverse: u64,
}

impl Stack {
    fn new(start: u32, stride: u32) -> Self {
        Self { start, stride, inverse: u64::MAX / u64::from(stride) + 1 }
    }

    /// Row and column of a position, by multiplying (Lemire, Kaser, Kurz 2019: exact for numbers of 32 bits).
    fn row_and_column(self, position: u32) -> (i32, i32) {
        let p = position - self.start;
        let row = ((u128::from(self.inverse) * u128::from(p)) >> 64) as u32;
        (row as i32, (p - row * self.stride) as i32)
    }
}

/// What memory is for, in messages.
const CELLS: &str = "the cells of the grids";

/// The cells of some grids and the regions they form.
#[derive(Debug)]
pub(super) struct RegionMap<W> {
    cells: Vec<W>,
    stacks: Vec<Stack>,
    /// Tokens below this are of the codebook: their regions are single cells.
    pub base_vocab_size: u32,
    /// Token of border cells, larger than any other.
    pub border: u32,
    /// Whether every cell is a region of its own.
    has_only_cells: bool,
}

impl<W: Word> RegionMap<W> {
    /// No grids, for tokens below `border`, those of the codebook being below `base_vocab_size`.
    pub fn new(base_vocab_size: u32, border: u32) -> Self {
        Self { cells: Vec::new(), stacks: Vec::new(), base_vocab_size, border, has_only_cells: true }
    }

    /// Number of positions that a grid takes, its borders included.
    pub fn num_positions(height: u32, width: u32) -> u64 {
        (u64::from(height) + 2) * (u64::from(width) + 1)
    }

    /// Makes room for exactly this many positions.
    pub fn reserve(&mut self, positions: usize) -> Result<()> {
        memory::reserve_exact(&mut self.cells, positions, CELLS)
    }

    /// Puts a grid that is all border below the others and returns the position of its first cell.
    pub fn add_grid(&mut self, height: u32, width: u32) -> Result<u32> {
        let stride = width + 1;
        let border = W::new(self.border, 0);
        let mut end = self.cells.len();
        // A new stack begins with a row of border.
        if self.stacks.last().is_none_or(|stack| stack.stride != stride) {
            memory::push(&mut self.stacks, Stack::new(end as u32, stride), CELLS)?;
            end += stride as usize;
        }
        // The row of border below the grid is also the one above the next grid.
        memory::resize(&mut self.cells, end + (height as usize + 1) * stride as usize, border, CELLS)?;
        Ok(end as u32)
    }

    /// Makes cells regions of their own: a row of a grid, from this position on.
    pub fn set_row(&mut self, position: u32, ids: &[u32]) {
        let start = position as usize;
        for (cell, &id) in self.cells[start..start + ids.len()].iter_mut().zip(ids) {
            *cell = W::new(id, 0);
        }
    }

    /// Whether every cell is a region of its own.
    pub fn has_only_cells(&self) -> bool {
        self.has_only_cells
    }

    /// Visits all cells, as (position, token, token right of it, token below it), and also some of the border.
    #[inline]
    pub fn for_each_cell(&self, mut visit: impl FnMut(u32, u32, u32, u32)) {
        for (i, &Stack { start, stride, .. }) in self.stacks.iter().enumerate() {
            let end = self.stacks.get(i + 1).map_or(self.cells.len(), |next| next.start as usize);
            let cells = &self.cells[start as usize..end];
            // The last row is border.
            let len = cells.len() - stride as usize;
            let (here, right, below) = (&cells[..len], &cells[1..=len], &cells[stride as usize..]);
            for i in 0..len {
                visit(start + i as u32, here[i].token(), right[i].token(), below[i].token());
            }
        }
    }

    /// Number of positions, borders included.
    pub fn len(&self) -> usize {
        self.cells.len()
    }

    /// Width of a row, border included.
    pub fn stride(&self, position: u32) -> u32 {
        self.stack(position).stride
    }

    /// Width of a row, border included, and where rows of that width begin.
    fn stack(&self, position: u32) -> Stack {
        match self.stacks.as_slice() {
            [stack] => *stack,
            stacks => stacks[stacks.partition_point(|stack| stack.start <= position) - 1],
        }
    }

    /// The cells, some of which are going to be merged, and the token of border cells.
    pub fn cells_to_merge(&mut self) -> (&mut [W], u32) {
        self.has_only_cells = false;
        (&mut self.cells, self.border)
    }

    /// The stride (width of a row, border included) of the first occurrence in a list in raster order, and how many of
    /// the first occurrences have it; `position` is that of an occurrence.
    pub fn leading_stride<T>(&self, list: &[T], position: impl Fn(&T) -> u32) -> Option<(u32, usize)> {
        let first = position(list.first()?);
        let number = self.stacks.partition_point(|stack| stack.start <= first) - 1;
        let len = match self.stacks.get(number + 1) {
            Some(next) => list.partition_point(|occurrence| position(occurrence) < next.start),
            None => list.len(),
        };
        Some((self.stacks[number].stride, len))
    }

    /// Writes those positions to `output` where a single cell of `a` is left of or above one of `b`, and returns them.
    /// Branchless.
    pub fn filter_cell_pairs<'a>(
        &self,
        positions: &[u32],
        (a, b): (u32, u32),
        stride: u32,
        output: &'a mut [u32],
    ) -> &'a [u32] {
        let cells = self.cells.as_slice();
        let mut len = 0;
        for &p in positions {
            output[len] = p;
            len += usize::from(
                has_anchor(cells, p, a) & (has_anchor(cells, p + 1, b) | has_anchor(cells, p + stride, b)),
            );
        }
        &output[..len]
    }

    /// Moves those pairs of regions to the front that still have these tokens, and returns how many they are.
    /// Branchless.
    pub fn retain_pairs(&self, pairs: &mut [u64], a: u32, b: u32) -> usize {
        let cells = self.cells.as_slice();
        let mut len = 0;
        for i in 0..pairs.len() {
            let (x, y) = unpack(pairs[i]);
            pairs[len] = pairs[i];
            len += usize::from(has_anchor(cells, x, a) & has_anchor(cells, y, b));
        }
        len
    }

    /// Begins to load the cache lines of pairs of regions' anchors.
    pub fn prefetch_anchors(&self, pairs: &[u64]) {
        for &pair in pairs {
            let (x, y) = unpack(pair);
            prefetch(&self.cells, x as usize);
            prefetch(&self.cells, y as usize);
        }
    }

    /// Begins to load the cache lines around pairs of regions.
    pub fn prefetch_around(&self, pairs: &[u64], stride: u32) {
        for &pair in pairs {
            let (x, y) = unpack(pair);
            for q in [x - stride, x + stride, y - stride, y + stride] {
                prefetch(&self.cells, q as usize);
            }
        }
    }

    /// Begins to load the cache lines around single cells and the cells right of them and below them.
    pub fn prefetch_around_cells(&self, positions: &[u32], stride: u32) {
        for &p in positions {
            for q in [p - stride, p, p + stride, p + 2 * stride] {
                prefetch(&self.cells, q as usize);
            }
        }
    }

    /// Visits the pairs of adjacent regions, as (anchor, anchor, token, token), in raster order of the first anchor,
    /// for those in rows that begin between two positions. Cells are changed on the way, and changed back.
    pub fn for_each_pair(
        &mut self,
        from: usize,
        to: usize,
        neighbours: &mut Neighbours,
        visit: &mut impl FnMut(u32, u32, u32, u32),
    ) {
        let Self { cells, stacks, base_vocab_size, border, .. } = self;
        for (start, stride) in rows(stacks, from..to, cells.len()) {
            // The last column is border.
            for x in start..start + stride - 1 {
                let (anchor, a) = region_at(cells, x);
                // Only at anchors, so that every region comes once.
                if anchor != x || a == *border {
                    continue;
                }
                if a < *base_vocab_size {
                    // Whatever lies left of or above a single cell comes before it.
                    let (right, b) = region_at(cells, x + 1);
                    let (below, c) = region_at(cells, x + stride);
                    if b != *border && right > x {
                        visit(x, right, a, b);
                    }
                    if c != *border && below > x && below != right {
                        visit(x, below, a, c);
                    }
                } else {
                    neighbours.find(cells, x, stride, *border);
                    neighbours.for_each(|Neighbour { region: (y, b), .. }| {
                        if y > x && b != *border {
                            visit(x, y, a, b);
                        }
                    });
                }
            }
        }
    }

    /// Visits the pairs of adjacent cells in rows that begin between two positions, as (token, token, whether the cells
    /// are of two regions), the token with the first anchor first. A pair of regions comes once for each side of a cell
    /// that they share.
    pub fn for_each_side(&self, from: usize, to: usize, visit: &mut impl FnMut(u32, u32, bool)) {
        let Self { cells, stacks, border, .. } = self;
        for (start, stride) in rows(stacks, from..to, cells.len()) {
            // The last column is border.
            for p in start..start + stride - 1 {
                let (x, a) = region_at(cells, p);
                for q in [p + 1, p + stride] {
                    let (y, b) = region_at(cells, q);
                    let (first, second) = if x < y { (a, b) } else { (b, a) };
                    visit(first, second, (x != y) & (a.max(b) < *border));
                }
            }
        }
    }

    /// Makes `p` a cell of the region at `anchor`.
    pub fn join(&mut self, anchor: u32, p: u32, token: u32) {
        self.has_only_cells = false;
        self.cells[p as usize] = W::new(token, p - anchor);
    }

    /// Where `y` lies as seen from `x`; two positions of one grid.
    pub fn offset(&self, x: u32, y: u32) -> Offset {
        let stack = self.stack(x);
        let ((row_x, column_x), (row_y, column_y)) = (stack.row_and_column(x), stack.row_and_column(y));
        Offset { dy: row_y - row_x, dx: column_y - column_x }
    }
}

/// The rows that begin in a range of positions, as (start, stride), without the last of each stack, which is border.
fn rows(stacks: &[Stack], range: Range<usize>, len: usize) -> impl Iterator<Item = (u32, u32)> {
    stacks.iter().enumerate().flat_map(move |(i, &Stack { start, stride, .. })| {
        let end = stacks.get(i + 1).map_or(len, |next| next.start as usize);
        let first =
            start as usize + range.start.saturating_sub(start as usize).next_multiple_of(stride as usize);
        let rows = (first..range.end.min(end - stride as usize)).step_by(stride as usize);
        rows.map(move |start| (start as u32, stride))
    })
}
