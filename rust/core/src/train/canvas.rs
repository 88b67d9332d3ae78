//! The cells of many grids and the regions they form, packed for speed.
//!
//! Grids lie one below the other, with a column of border cells at the right of every row and a row of them above and
//! below every grid. So every cell has four neighbours without a test for edges, a position is one number, and
//! positions of one grid are in raster order.
//!
//! A cell is one word: the token of its region, how far before it the region's anchor lies, and how far the next cell
//! of the region is, cells of a region forming a ring. So one load says all about a neighbour.

use std::fmt::Debug;

use crate::grid::Offset;

/// A cell. Its label, in the low bits, is (distance to the anchor, token); the rest is the step to the next cell.
pub(super) trait Word: Copy + Debug + Send + Sync {
    const TOKEN_BITS: u32;
    const DISTANCE_BITS: u32;
    fn new(label: u64, step: i64) -> Self;
    fn label(self) -> u64;
    fn step(self) -> i64;

    /// The same step with another label.
    fn relabel(self, label: u64) -> Self;

    /// Token of border cells, larger than any other.
    const BORDER: u32 = u32::MAX >> (u32::BITS - Self::TOKEN_BITS);

    /// Whether there is room for tokens below `tokens` and for grids of at most `cells`, borders included.
    fn fits(tokens: u32, cells: u64) -> bool {
        tokens <= Self::BORDER && cells < 1 << Self::DISTANCE_BITS
    }
}

/// For two million tokens and grids of two million cells.
impl Word for u64 {
    const TOKEN_BITS: u32 = 21;
    const DISTANCE_BITS: u32 = 21;
    fn new(label: u64, step: i64) -> Self {
        label | (step as u64) << (Self::TOKEN_BITS + Self::DISTANCE_BITS)
    }
    fn label(self) -> u64 {
        self & (u64::MAX >> (u64::BITS - Self::TOKEN_BITS - Self::DISTANCE_BITS))
    }
    fn step(self) -> i64 {
        self as i64 >> (Self::TOKEN_BITS + Self::DISTANCE_BITS)
    }
    fn relabel(self, label: u64) -> Self {
        self & (u64::MAX << (Self::TOKEN_BITS + Self::DISTANCE_BITS)) | label
    }
}

/// For any tokens and grids.
impl Word for u128 {
    const TOKEN_BITS: u32 = 32;
    const DISTANCE_BITS: u32 = 32;
    fn new(label: u64, step: i64) -> Self {
        Self::from(label) | (step as Self) << u64::BITS
    }
    fn label(self) -> u64 {
        self as u64
    }
    fn step(self) -> i64 {
        (self >> u64::BITS) as i64
    }
    fn relabel(self, label: u64) -> Self {
        Self::new(label, self.step())
    }
}

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
    fn place(self, position: u32) -> (i32, i32) {
        let p = position - self.start;
        let row = ((u128::from(self.inverse) * u128::from(p)) >> 64) as u32;
        (row as i32, (p - row * self.stride) as i32)
    }
}

/// The cells of some grids and the regions they form.
#[derive(Debug)]
pub(super) struct Canvas<W> {
    cells: Vec<W>,
    stacks: Vec<Stack>,
}

impl<W> Default for Canvas<W> {
    fn default() -> Self {
        Self { cells: Vec::new(), stacks: Vec::new() }
    }
}

impl<W: Word> Canvas<W> {
    /// Number of cells that a grid takes, its borders included.
    pub fn footprint(height: u32, width: u32) -> u64 {
        (u64::from(height) + 2) * (u64::from(width) + 1)
    }

    /// Makes room for exactly this many cells.
    pub fn reserve(&mut self, cells: usize) {
        self.cells.reserve_exact(cells);
    }

    /// Puts a grid that is all border below the others and returns the position of its first cell.
    pub fn push(&mut self, height: u32, width: u32) -> u32 {
        let stride = width + 1;
        let border = W::new(W::BORDER.into(), 0);
        let mut end = self.cells.len();
        if self.stacks.last().is_none_or(|stack| stack.stride != stride) {
            self.stacks.push(Stack::new(end as u32, stride));
            end += stride as usize;
        }
        self.cells.resize(end + (height as usize + 1) * stride as usize, border);
        end as u32
    }

    /// Makes cells regions of their own: a row of a grid, from this position on.
    pub fn set_row(&mut self, position: u32, ids: &[u32]) {
        let start = position as usize;
        for (cell, &id) in self.cells[start..start + ids.len()].iter_mut().zip(ids) {
            *cell = W::new(id.into(), 0);
        }
    }

    /// Number of cells, borders included.
    pub fn len(&self) -> usize {
        self.cells.len()
    }

    /// The token of the region anchored here, if there is one; then the label is the token alone.
    pub fn is(&self, position: u32, token: u32) -> bool {
        self.cells[position as usize].label() == u64::from(token)
    }

    /// The region that covers a cell: its anchor and its token.
    #[inline]
    fn region(&self, position: u32) -> (u32, u32) {
        Self::region_of(position, self.cells[position as usize])
    }

    #[inline]
    fn region_of(position: u32, word: W) -> (u32, u32) {
        let label = word.label();
        (position.wrapping_sub((label >> W::TOKEN_BITS) as u32), label as u32 & W::BORDER)
    }

    fn next(&self, position: u32) -> u32 {
        let step = self.cells[position as usize].step();
        position.wrapping_add(step as u32)
    }

    /// Width of a row, border included, and where rows of that width begin.
    fn stack(&self, position: u32) -> Stack {
        match self.stacks.as_slice() {
            [stack] => *stack,
            stacks => stacks[stacks.partition_point(|stack| stack.start <= position) - 1],
        }
    }

    /// Finds the regions adjacent to the region at `anchor`, each once.
    #[inline]
    pub fn neighbours(&self, anchor: u32, found: &mut Neighbours) {
        if self.next(anchor) == anchor {
            self.neighbours_of_cell(anchor, found);
        } else {
            self.neighbours_of_region(anchor, found);
        }
    }

    /// Candidates are written in any case and kept by moving on, since a branch would be guessed wrong all the time.
    fn neighbours_of_cell(&self, p: u32, found: &mut Neighbours) {
        let Stack { stride, .. } = self.stack(p);
        let Neighbours { anchors, tokens, len, .. } = found;
        let [up, left, right, down] = [p - stride, p - 1, p + 1, p + stride].map(|q| self.region(q));
        let fresh = [
            up.1 != W::BORDER,
            left.1 != W::BORDER && left.0 != up.0,
            right.1 != W::BORDER && right.0 != up.0 && right.0 != left.0,
            down.1 != W::BORDER && down.0 != up.0 && down.0 != left.0 && down.0 != right.0,
        ];
        let mut end = 0;
        for ((other, token), fresh) in [up, left, right, down].into_iter().zip(fresh) {
            (anchors[end], tokens[end]) = (other, token);
            end += usize::from(fresh);
        }
        // What is compared later must be clean.
        anchors[end..].iter_mut().take(LANES).for_each(|anchor| *anchor = NOWHERE);
        *len = end;
    }

    fn neighbours_of_region(&self, anchor: u32, found: &mut Neighbours) {
        let Stack { stride, .. } = self.stack(anchor);
        let Neighbours { anchors, tokens, len, many } = found;
        *anchors = [NOWHERE; FEW];
        let mut end = 0;
        let mut p = anchor;
        loop {
            if end + 4 >= FEW {
                *len = FEW;
                return self.many_neighbours(anchor, many);
            }
            let around = [p - stride, p - 1, p + 1, p + stride].map(|q| self.region(q));
            let inside = around.iter().all(|&(other, _)| other == anchor);
            for (other, token) in around.into_iter().take(if inside { 0 } else { 4 }) {
                let fresh =
                    u8::from(other != anchor) & u8::from(token != W::BORDER) & !contains(anchors, end, other);
                (anchors[end], tokens[end]) = (other, token);
                end += usize::from(fresh);
            }
            p = self.next(p);
            if p == anchor {
                break;
            }
        }
        *len = end;
    }

    #[cold]
    fn many_neighbours(&self, anchor: u32, found: &mut Vec<(u32, u32)>) {
        let Stack { stride, .. } = self.stack(anchor);
        found.clear();
        let mut p = anchor;
        loop {
            for q in [p - stride, p - 1, p + 1, p + stride] {
                let (other, token) = self.region(q);
                if other != anchor && token != W::BORDER {
                    found.push((other, token));
                }
            }
            p = self.next(p);
            if p == anchor {
                break;
            }
        }
        found.sort_unstable();
        found.dedup();
    }

    /// Finds the regions with token `b` that are adjacent to the region at `x` and come after it, each once.
    pub fn partners(&self, x: u32, b: u32, found: &mut Vec<u32>) {
        let Stack { stride, .. } = self.stack(x);
        found.clear();
        let mut add = |q: u32| {
            let (y, token) = self.region(q);
            if token == b && y > x {
                found.push(y);
            }
        };
        let mut p = x;
        loop {
            add(p + 1);
            add(p + stride);
            if p != x || self.next(x) != x {
                add(p - 1);
                add(p - stride);
            }
            p = self.next(p);
            if p == x {
                break;
            }
        }
        found.sort_unstable();
        found.dedup();
    }

    /// Moves those positions to the front where a region with this token is anchored, and returns how many they are.
    ///
    /// Reads the lines of memory around them, all at once, so that they are at hand one by one.
    pub fn fetch(&self, positions: &mut [u32], token: u32) -> usize {
        let mut kept = 0;
        for i in 0..positions.len() {
            let p = positions[i];
            positions[kept] = p;
            kept += usize::from(self.is(p, token));
        }
        let mut sum = 0;
        for &p in &positions[..kept] {
            let Stack { stride, .. } = self.stack(p);
            for q in [p - stride, p + stride] {
                sum ^= self.cells[q as usize].label();
            }
        }
        std::hint::black_box(sum);
        kept
    }

    /// Visits the pairs of adjacent regions, as (anchor of the first, its token, token of the second), in raster order
    /// of the first's anchor, where that is between two positions.
    pub fn for_each_pair(&self, from: usize, to: usize, mut visit: impl FnMut(u32, u32, u32)) {
        let mut found = Neighbours::default();
        for (i, &Stack { start, stride, .. }) in self.stacks.iter().enumerate() {
            let end = self.stacks.get(i + 1).map_or(self.cells.len(), |next| next.start as usize);
            // The last row is border.
            let (first, last) = (from.max(start as usize), to.min(end - stride as usize));
            if first >= last {
                continue;
            }
            let rights = &self.cells[first + 1..=last];
            let belows = &self.cells[first + stride as usize..last + stride as usize];
            let words = self.cells[first..last].iter().zip(rights).zip(belows);
            for (x, ((&word, &right), &below)) in (first as u32..).zip(words) {
                let label = word.label();
                if label >= u64::from(W::BORDER) {
                    // Border, or no anchor: at distance 0 the label is the token.
                    continue;
                }
                let token = label as u32;
                if word.step() == 0 {
                    // Whatever lies left of or above a single cell comes before it.
                    let (right, b) = Self::region_of(x + 1, right);
                    let (below, c) = Self::region_of(x + stride, below);
                    if b != W::BORDER && right > x {
                        visit(x, token, b);
                    }
                    if c != W::BORDER && below > x && below != right {
                        visit(x, token, c);
                    }
                } else {
                    self.neighbours(x, &mut found);
                    found.for_each(|other, b| {
                        if other > x {
                            visit(x, token, b);
                        }
                    });
                }
            }
        }
    }

    /// Joins region `y` to region `x`, both given by their anchors, `x < y`. The anchor is `x`.
    pub fn merge(&mut self, x: u32, y: u32, token: u32) {
        let mut relabel = |start: u32| {
            let mut p = start;
            loop {
                let cell = &mut self.cells[p as usize];
                *cell = cell.relabel(u64::from(p - x) << W::TOKEN_BITS | u64::from(token));
                p = p.wrapping_add(cell.step() as u32);
                if p == start {
                    break;
                }
            }
        };
        relabel(x);
        relabel(y);
        // Two rings become one when one link of each is exchanged.
        let (after_x, after_y) = (self.next(x), self.next(y));
        self.link(x, after_y);
        self.link(y, after_x);
    }

    fn link(&mut self, from: u32, to: u32) {
        let cell = &mut self.cells[from as usize];
        *cell = W::new(cell.label(), i64::from(to) - i64::from(from));
    }

    /// Makes `p` a cell of the region at `anchor`, right after the anchor in the ring.
    pub fn join(&mut self, anchor: u32, p: u32, token: u32) {
        let after = self.next(anchor);
        let label = u64::from(p - anchor) << W::TOKEN_BITS | u64::from(token);
        self.cells[p as usize] = W::new(label, i64::from(after) - i64::from(p));
        self.link(anchor, p);
    }

    /// Where `y` lies as seen from `x`; two positions of one grid.
    pub fn offset(&self, x: u32, y: u32) -> Offset {
        let stack = self.stack(x);
        let ((row, column), (other_row, other_column)) = (stack.place(x), stack.place(y));
        Offset { dy: other_row - row, dx: other_column - column }
    }
}

/// Anchors compared at once.
const LANES: usize = 8;

/// With more neighbours than this, sorting finds repeated ones sooner than comparing.
const FEW: usize = 4 * LANES;

/// No region is anchored here.
const NOWHERE: u32 = u32::MAX;

/// Whether an anchor is among the first `len`; 1 or 0. Behind them is nowhere, or one that was not wanted.
#[inline]
fn contains(anchors: &[u32; FEW], len: usize, anchor: u32) -> u8 {
    let (blocks, _) = anchors.as_chunks::<LANES>();
    let mut found = 0;
    for block in &blocks[..=len / LANES] {
        for &other in block {
            found |= u32::from(other == anchor);
        }
    }
    found as u8
}

/// Regions adjacent to a region, each once.
#[derive(Debug)]
pub(super) struct Neighbours {
    /// If there are fewer than `FEW`, the first `len` count.
    anchors: [u32; FEW],
    tokens: [u32; FEW],
    len: usize,
    /// Otherwise all of them, in order.
    many: Vec<(u32, u32)>,
}

impl Default for Neighbours {
    fn default() -> Self {
        Self { anchors: [NOWHERE; FEW], tokens: [0; FEW], len: 0, many: Vec::new() }
    }
}

impl Neighbours {
    /// Number of regions.
    pub fn len(&self) -> usize {
        if self.len < FEW { self.len } else { self.many.len() }
    }

    /// Whether a region other than the one in the middle is here.
    #[inline]
    pub fn contains(&self, anchor: u32) -> bool {
        if self.len < FEW {
            contains(&self.anchors, self.len, anchor) == 1
        } else {
            self.many.binary_search_by_key(&anchor, |&(other, _)| other).is_ok()
        }
    }

    /// Visits (anchor, token) of each.
    #[inline]
    pub fn for_each(&self, mut visit: impl FnMut(u32, u32)) {
        if self.len < FEW {
            for (&anchor, &token) in self.anchors[..self.len].iter().zip(&self.tokens[..self.len]) {
                visit(anchor, token);
            }
        } else {
            self.many.iter().for_each(|&(anchor, token)| visit(anchor, token));
        }
    }
}
