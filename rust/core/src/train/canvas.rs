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
    /// Number of bits.
    const BITS: u32;
    fn new(label: u64, step: i64, label_bits: u32) -> Self;
    /// The low 64 bits, of which the label is a part.
    fn low(self) -> u64;
    fn step(self, label_bits: u32) -> i64;
}

/// For grids of up to about a million cells.
impl Word for u64 {
    const BITS: u32 = u64::BITS;
    fn new(label: u64, step: i64, label_bits: u32) -> Self {
        label | (step as u64) << label_bits
    }
    fn low(self) -> u64 {
        self
    }
    fn step(self, label_bits: u32) -> i64 {
        self as i64 >> label_bits
    }
}

/// For any grid.
impl Word for u128 {
    const BITS: u32 = u128::BITS;
    fn new(label: u64, step: i64, label_bits: u32) -> Self {
        Self::from(label) | (step as Self) << label_bits
    }
    fn low(self) -> u64 {
        self as u64
    }
    fn step(self, label_bits: u32) -> i64 {
        (self as i128 >> label_bits) as i64
    }
}

/// How a word is divided.
#[derive(Debug, Clone, Copy)]
pub(super) struct Division {
    token_bits: u32,
    distance_bits: u32,
}

impl Division {
    /// Room for tokens below `tokens` and one more for borders, and for grids of at most `cells`, borders included.
    pub fn new(tokens: u32, cells: u64) -> Self {
        Self {
            token_bits: u32::BITS - tokens.leading_zeros(),
            distance_bits: u64::BITS - cells.leading_zeros(),
        }
    }

    /// Whether a word of type `W` is large enough. Steps need a sign.
    pub fn fits<W: Word>(self) -> bool {
        self.token_bits + 2 * self.distance_bits < W::BITS
    }
}

/// Grids of one width, one below the other.
#[derive(Debug, Clone, Copy)]
struct Stack {
    start: u32,
    stride: u32,
}

/// The cells of some grids and the regions they form.
#[derive(Debug)]
pub(super) struct Canvas<W> {
    cells: Vec<W>,
    stacks: Vec<Stack>,
    token_bits: u32,
    label_bits: u32,
}

impl<W: Word> Canvas<W> {
    /// Number of cells that a grid takes, its borders included.
    pub fn footprint(height: u32, width: u32) -> u64 {
        (u64::from(height) + 2) * (u64::from(width) + 1)
    }

    pub fn new(Division { token_bits, distance_bits }: Division) -> Self {
        Self { cells: Vec::new(), stacks: Vec::new(), token_bits, label_bits: token_bits + distance_bits }
    }

    /// Makes room for exactly this many cells.
    pub fn reserve(&mut self, cells: usize) {
        self.cells.reserve_exact(cells);
    }

    fn border(&self) -> u32 {
        ((1_u64 << self.token_bits) - 1) as u32
    }

    /// Puts a grid that is all border below the others and returns the position of its first cell.
    pub fn push(&mut self, height: u32, width: u32) -> u32 {
        let stride = width + 1;
        let border = W::new(self.border().into(), 0, self.label_bits);
        let mut end = self.cells.len();
        if self.stacks.last().is_none_or(|stack| stack.stride != stride) {
            self.stacks.push(Stack { start: end as u32, stride });
            end += stride as usize;
        }
        self.cells.resize(end + (height as usize + 1) * stride as usize, border);
        end as u32
    }

    /// Makes cells regions of their own: a row of a grid, from this position on.
    pub fn set_row(&mut self, position: u32, ids: &[u32]) {
        let start = position as usize;
        for (cell, &id) in self.cells[start..start + ids.len()].iter_mut().zip(ids) {
            *cell = W::new(id.into(), 0, self.label_bits);
        }
    }

    /// All anchors with their tokens, grid after grid, in raster order, from a position to before another.
    fn anchors(&self, start: usize, end: usize) -> impl Iterator<Item = (u32, u32)> + '_ {
        let border = u64::from(self.border());
        (start as u32..).zip(&self.cells[start..end]).filter_map(move |(p, word)| {
            let label = self.label(*word);
            // At distance 0 the label is the token.
            (label < border).then_some((p, label as u32))
        })
    }

    /// Number of cells, borders included.
    pub fn len(&self) -> usize {
        self.cells.len()
    }

    /// The token of the region anchored here, if there is one; then the label is the token alone.
    pub fn is(&self, position: u32, token: u32) -> bool {
        self.label(self.cells[position as usize]) == u64::from(token)
    }

    fn label(&self, word: W) -> u64 {
        word.low() & (u64::MAX >> (u64::BITS - self.label_bits))
    }

    /// The region that covers a cell: its anchor and its token.
    fn region(&self, position: u32) -> (u32, u32) {
        let label = self.label(self.cells[position as usize]);
        (position.wrapping_sub((label >> self.token_bits) as u32), label as u32 & self.border())
    }

    fn next(&self, position: u32) -> u32 {
        let step = self.cells[position as usize].step(self.label_bits);
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
    pub fn neighbours(&self, anchor: u32, found: &mut Neighbours) {
        let Stack { stride, .. } = self.stack(anchor);
        let border = self.border();
        found.clear();
        let mut p = anchor;
        loop {
            for q in [p - stride, p - 1, p + 1, p + stride] {
                let (other, token) = self.region(q);
                found.add(other, token, other != anchor && token != border);
            }
            p = self.next(p);
            if p == anchor {
                break;
            }
        }
        found.finish();
    }

    /// Reads the lines of memory around these cells, all at once, so that they are at hand one by one.
    pub fn fetch(&self, positions: &[u32]) {
        let mut sum = 0;
        for &p in positions {
            let Stack { stride, .. } = self.stack(p);
            for q in [p - stride, p, p + stride] {
                sum ^= self.cells[q as usize].low();
            }
        }
        std::hint::black_box(sum);
    }

    /// Visits the pairs of adjacent regions, as (anchor of the first, its token, token of the second), in raster order
    /// of the first's anchor, between two positions.
    pub fn for_each_pair(&self, start: usize, end: usize, mut visit: impl FnMut(u32, u32, u32)) {
        let border = self.border();
        let mut found = Neighbours::default();
        for (x, token) in self.anchors(start, end) {
            if self.next(x) == x {
                // Whatever lies left of or above a single cell comes before it.
                let Stack { stride, .. } = self.stack(x);
                let (right, b) = self.region(x + 1);
                if right > x && b != border {
                    visit(x, token, b);
                }
                let (below, c) = self.region(x + stride);
                if below > x && c != border && !(below == right && b != border) {
                    visit(x, token, c);
                }
            } else {
                self.neighbours(x, &mut found);
                for (other, b) in found.iter() {
                    if other > x {
                        visit(x, token, b);
                    }
                }
            }
        }
    }

    /// Joins region `y` to region `x`, both given by their anchors, `x < y`. The anchor is `x`.
    pub fn merge(&mut self, x: u32, y: u32, token: u32) {
        let label_bits = self.label_bits;
        let mut relabel = |start: u32| {
            let mut p = start;
            loop {
                let cell = &mut self.cells[p as usize];
                let step = cell.step(label_bits);
                let label = u64::from(p - x) << self.token_bits | u64::from(token);
                *cell = W::new(label, step, label_bits);
                p = p.wrapping_add(step as u32);
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
        let label = self.label(self.cells[from as usize]);
        self.cells[from as usize] = W::new(label, i64::from(to) - i64::from(from), self.label_bits);
    }

    /// Makes `p` a cell of the region at `anchor`, right after the anchor in the ring.
    pub fn join(&mut self, anchor: u32, p: u32, token: u32) {
        let after = self.next(anchor);
        let label = u64::from(p - anchor) << self.token_bits | u64::from(token);
        self.cells[p as usize] = W::new(label, i64::from(after) - i64::from(p), self.label_bits);
        self.link(anchor, p);
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

/// Anchors compared at once.
const LANES: usize = 8;

/// With more regions than this, sorting finds repeated ones sooner than comparing.
const SORTED: usize = 4 * LANES;

/// No region is anchored here.
const NOWHERE: u32 = u32::MAX;

/// Regions adjacent to a region, each once.
#[derive(Debug, Default)]
pub(super) struct Neighbours {
    /// Always written and kept by moving on, since a branch would be guessed wrong all the time.
    anchors: Vec<u32>,
    tokens: Vec<u32>,
    len: usize,
}

impl Neighbours {
    fn clear(&mut self) {
        self.len = 0;
        self.open_block();
    }

    /// Makes sure that there is a clean block to write to.
    fn open_block(&mut self) {
        let end = self.len + LANES;
        if self.anchors.len() < end {
            self.anchors.resize(2 * end, NOWHERE);
            self.tokens.resize(2 * end, 0);
        }
        self.anchors[self.len..end].fill(NOWHERE);
    }

    #[inline]
    fn add(&mut self, anchor: u32, token: u32, wanted: bool) {
        let known = self.len < SORTED && self.compare(anchor);
        self.anchors[self.len] = anchor;
        self.tokens[self.len] = token;
        let fresh = wanted & !known;
        self.len += usize::from(fresh);
        if fresh & self.len.is_multiple_of(LANES) {
            self.open_block();
        }
    }

    /// Whether an anchor is in one of the first blocks. Behind the last region there may be one that was not wanted.
    #[inline]
    fn compare(&self, anchor: u32) -> bool {
        let (blocks, _) = self.anchors.as_chunks::<LANES>();
        let equal =
            |block: &[u32; LANES]| block.iter().fold(false, |found, &other| found | (other == anchor));
        blocks[..=self.len / LANES].iter().any(equal)
    }

    fn finish(&mut self) {
        if self.len >= SORTED {
            let mut all: Vec<(u32, u32)> = self.iter().collect();
            all.sort_unstable();
            all.dedup();
            self.len = all.len();
            for (i, (anchor, token)) in all.into_iter().enumerate() {
                (self.anchors[i], self.tokens[i]) = (anchor, token);
            }
        }
    }

    /// Whether a region other than the one in the middle is here.
    #[inline]
    pub fn contains(&self, anchor: u32) -> bool {
        if self.len < SORTED {
            self.compare(anchor)
        } else {
            self.anchors[..self.len].binary_search(&anchor).is_ok()
        }
    }

    /// (anchor, token) of each.
    pub fn iter(&self) -> impl Iterator<Item = (u32, u32)> + '_ {
        self.anchors[..self.len].iter().copied().zip(self.tokens[..self.len].iter().copied())
    }
}
