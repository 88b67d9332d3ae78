//! Regions: which cells hang together, and what lies beside them.
//!
//! Grids lie one below the other on a [`Canvas`], with a column of border cells at the right of every row and a row
//! of them above and below every grid. So every cell has four neighbours without a test for edges, a position is
//! one number, and positions of one grid are in raster order.

use crate::grid::{Grid, Offset};

/// The anchor of border cells. It is larger than any position.
pub(crate) const BORDER: u32 = u32::MAX;

/// One cell. A region's cells form a ring through `next`; its token stands at its anchor and is stale elsewhere.
#[derive(Debug, Clone, Copy)]
struct Cell {
    anchor: u32,
    token: u32,
    next: u32,
}

/// Grids of one width, one below the other.
#[derive(Debug, Clone, Copy)]
struct Stack {
    start: u32,
    stride: u32,
}

/// The cells of some grids and the regions they form.
#[derive(Debug, Default)]
pub(crate) struct Canvas {
    cells: Vec<Cell>,
    stacks: Vec<Stack>,
    /// Where each grid ends.
    ends: Vec<u32>,
}

impl Canvas {
    /// Number of cells that a grid takes, its borders included.
    pub fn footprint(height: u32, width: u32) -> u64 {
        (u64::from(height) + 2) * (u64::from(width) + 1)
    }

    /// Makes room for exactly this many cells.
    pub fn with_capacity(cells: usize) -> Self {
        Self { cells: Vec::with_capacity(cells), ..Self::default() }
    }

    /// Removes all grids and keeps the memory.
    pub fn clear(&mut self) {
        self.cells.clear();
        self.stacks.clear();
        self.ends.clear();
    }

    /// Puts a grid below the others, every cell a region of its own.
    pub fn push(&mut self, grid: &Grid) {
        let stride = grid.width() + 1;
        if self.stacks.last().is_none_or(|stack| stack.stride != stride) {
            self.stacks.push(Stack { start: self.cells.len() as u32, stride });
            self.push_border(stride);
        }
        for row in grid.ids().chunks_exact(grid.width() as usize) {
            let start = self.cells.len() as u32;
            let cells = (start..).zip(row).map(|(p, &token)| Cell { anchor: p, token, next: p });
            self.cells.extend(cells);
            self.push_border(1);
        }
        self.push_border(stride);
        self.ends.push(self.cells.len() as u32);
    }

    fn push_border(&mut self, cells: u32) {
        let border = Cell { anchor: BORDER, token: BORDER, next: BORDER };
        self.cells.resize(self.cells.len() + cells as usize, border);
    }

    /// Number of cells, borders included.
    pub fn len(&self) -> usize {
        self.cells.len()
    }

    /// All anchors, grid after grid, in raster order.
    pub fn anchors(&self) -> impl Iterator<Item = u32> + '_ {
        (0..).zip(&self.cells).filter(|(p, cell)| cell.anchor == *p).map(|(p, _)| p)
    }

    /// The token of the region anchored at `anchor`, or `None` if no region is.
    pub fn token_at(&self, anchor: u32) -> Option<u32> {
        let cell = self.cells[anchor as usize];
        (cell.anchor == anchor).then_some(cell.token)
    }

    /// The token of a region, given its anchor.
    pub fn token(&self, anchor: u32) -> u32 {
        self.cells[anchor as usize].token
    }

    /// Changes the token of a region, given its anchor.
    pub fn set_token(&mut self, anchor: u32, token: u32) {
        self.cells[anchor as usize].token = token;
    }

    /// The anchor of the region that covers a cell, or [`BORDER`].
    pub fn anchor(&self, position: u32) -> u32 {
        self.cells[position as usize].anchor
    }

    /// Width of a row, border included, where this position lies.
    fn stack(&self, position: u32) -> Stack {
        match self.stacks.as_slice() {
            [stack] => *stack,
            stacks => stacks[stacks.partition_point(|stack| stack.start <= position) - 1],
        }
    }

    /// Appends the anchors of all regions adjacent to the region at `anchor`, ascending, each once.
    pub fn neighbours(&self, anchor: u32, found: &mut Vec<u32>) {
        let stride = self.stack(anchor).stride;
        let first = found.len();
        let mut end = first;
        let mut p = anchor;
        loop {
            // Always written and kept by moving on, since a branch here would be guessed wrong all the time.
            if found.len() < end + 4 {
                found.resize(end + 16, 0);
            }
            for q in [p - stride, p - 1, p + 1, p + stride] {
                let other = self.cells[q as usize].anchor;
                found[end] = other;
                end += usize::from(other != anchor) * usize::from(other != BORDER);
            }
            p = self.cells[p as usize].next;
            if p == anchor {
                break;
            }
        }
        let fresh = &mut found[first..end];
        fresh.sort_unstable();
        let mut kept = 0;
        let mut last = BORDER;
        for i in 0..fresh.len() {
            let other = fresh[i];
            fresh[kept] = other;
            kept += usize::from(other != last);
            last = other;
        }
        found.truncate(first + kept);
    }

    /// Where the grid around this position ends.
    pub fn grid_end(&self, position: u32) -> u32 {
        self.ends[self.ends.partition_point(|&end| end <= position)]
    }

    /// Appends those neighbours of a region that come after it in raster order.
    pub fn later_neighbours(&self, anchor: u32, found: &mut Vec<u32>) {
        let first = found.len();
        if self.cells[anchor as usize].next == anchor {
            // Whatever lies left of or above a single cell comes before it.
            let [right, below] = self.right_and_below(anchor, self.stack(anchor).stride);
            for other in [right, if below == right { BORDER } else { below }] {
                if other > anchor && other != BORDER {
                    found.push(other);
                }
            }
        } else {
            self.neighbours(anchor, found);
            let before = found[first..].partition_point(|&other| other < anchor);
            found.drain(first..first + before);
        }
    }

    /// The regions to the right of and below a cell that is still a region of its own.
    pub fn right_and_below(&self, position: u32, stride: u32) -> [u32; 2] {
        [self.anchor(position + 1), self.anchor(position + stride)]
    }

    /// Joins region `y` to region `x`, both given by their anchors, `x < y`. The anchor is `x`; `visit` sees `y`'s cells.
    pub fn merge(&mut self, x: u32, y: u32, token: u32, mut visit: impl FnMut(u32)) {
        let mut p = y;
        loop {
            let cell = &mut self.cells[p as usize];
            cell.anchor = x;
            visit(p);
            p = cell.next;
            if p == y {
                break;
            }
        }
        // Two rings become one when one link of each is exchanged.
        let (after_x, after_y) = (self.cells[x as usize].next, self.cells[y as usize].next);
        self.cells[x as usize].next = after_y;
        self.cells[y as usize].next = after_x;
        self.cells[x as usize].token = token;
    }

    /// Where `y` lies as seen from `x`; two positions of one grid.
    pub fn offset(&self, x: u32, y: u32) -> Offset {
        let Stack { start, stride } = self.stack(x);
        let (x, y) = (x - start, y - start);
        Offset {
            dy: (y / stride) as i32 - (x / stride) as i32,
            dx: (y % stride) as i32 - (x % stride) as i32,
        }
    }
}
