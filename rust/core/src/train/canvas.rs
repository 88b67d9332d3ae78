//! The cells of many grids and the regions they form, packed for speed.
//!
//! Grids lie one below the other, with a column of border cells at the right of every row and a row of them above and
//! below every grid. So every cell has four neighbours without a test for edges, a position is one number, and
//! positions of one grid are in raster order.
//!
//! A cell is one word: the token of its region, how far before it the region's anchor lies, and how far the next cell
//! of the region is, cells of a region forming a ring. So one load says all about a neighbour.

use std::fmt::Debug;
use std::ops::Range;

use super::count::unpack;
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

    /// The largest token.
    const MAX_TOKEN: u32 = u32::MAX >> (u32::BITS - Self::TOKEN_BITS);

    /// Whether there is room for tokens up to `border` and for grids of at most `cells`, borders included.
    fn fits(border: u32, cells: u64) -> bool {
        border <= Self::MAX_TOKEN && cells < 1 << Self::DISTANCE_BITS
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
    /// Token of border cells, larger than any other.
    border: u32,
    /// Whether every cell is a region of its own.
    single: bool,
}

/// A region as seen from one of its cells: its anchor and its token.
pub(super) type Region = (u32, u32);

impl<W: Word> Canvas<W> {
    /// No grids, for tokens below `border`.
    pub fn new(border: u32) -> Self {
        Self { cells: Vec::new(), stacks: Vec::new(), border, single: true }
    }

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
        let border = W::new(self.border.into(), 0);
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
    pub fn region(&self, position: u32) -> Region {
        Self::region_of(position, self.cells[position as usize])
    }

    #[inline]
    fn region_of(position: u32, word: W) -> Region {
        let label = word.label();
        (position.wrapping_sub((label >> W::TOKEN_BITS) as u32), label as u32 & W::MAX_TOKEN)
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

    /// Whether this is the token of border cells.
    #[inline]
    pub fn is_border(&self, token: u32) -> bool {
        token == self.border
    }

    /// Finds the regions adjacent to the region at `anchor`, each once.
    #[inline]
    pub fn neighbours(&self, anchor: u32, stride: u32, found: &mut Neighbours) {
        found.clear();
        found.mark(anchor);
        let mut p = anchor;
        loop {
            if found.len + 4 > found.regions.len() {
                return self.many_neighbours(anchor, stride, found);
            }
            for q in [p - stride, p - 1, p + 1, p + stride] {
                let region = self.region(q);
                if !found.add(region, region.1 != self.border) {
                    return self.many_neighbours(anchor, stride, found);
                }
            }
            p = self.next(p);
            if p == anchor {
                return;
            }
        }
    }

    #[cold]
    fn many_neighbours(&self, anchor: u32, stride: u32, found: &mut Neighbours) {
        found.clear();
        let many = &mut found.many;
        let mut p = anchor;
        loop {
            for q in [p - stride, p - 1, p + 1, p + stride] {
                let (other, token) = self.region(q);
                if other != anchor && token != self.border {
                    many.push((other, token));
                }
            }
            p = self.next(p);
            if p == anchor {
                break;
            }
        }
        many.sort_unstable();
        many.dedup();
    }

    /// Splits a list of places in raster order by the width of rows, border included; `position` is that of a place.
    pub fn by_stride<T>(&self, list: &[T], position: impl Fn(&T) -> u32) -> Vec<(u32, Range<usize>)> {
        let mut parts = Vec::new();
        let mut start = 0;
        while let Some(first) = list.get(start) {
            let number = self.stacks.partition_point(|stack| stack.start <= position(first));
            let len = match self.stacks.get(number) {
                Some(next) => list[start..].partition_point(|place| position(place) < next.start),
                None => list.len() - start,
            };
            parts.push((self.stacks[number - 1].stride, start..start + len));
            start += len;
        }
        parts
    }

    /// Moves those pairs of regions to the front that still have these tokens, and returns how many they are.
    pub fn retain(&self, pairs: &mut [u64], a: u32, b: u32) -> usize {
        let mut kept = 0;
        for i in 0..pairs.len() {
            let (x, y) = unpack(pairs[i]);
            pairs[kept] = pairs[i];
            kept += usize::from(self.is(x, a) & self.is(y, b));
        }
        kept
    }

    /// The same, for pairs that are to be merged.
    ///
    /// Reads the lines of memory around them, all at once, so that they are at hand one by one.
    pub fn fetch(&self, pairs: &mut [u64], a: u32, b: u32, stride: u32) -> usize {
        let (mut kept, mut sum) = (0, 0);
        for i in 0..pairs.len() {
            let (x, y) = unpack(pairs[i]);
            pairs[kept] = pairs[i];
            kept += usize::from(self.is(x, a) & self.is(y, b));
            for q in [x - stride, x + stride, y - stride, y + stride] {
                sum ^= self.cells[q as usize].label();
            }
        }
        std::hint::black_box(sum);
        kept
    }

    /// The same for single cells, given the first of each pair: `b` is right of it or below it.
    pub fn fetch_cells(&self, positions: &mut [u32], a: u32, b: u32, stride: u32) -> usize {
        let (mut kept, mut sum) = (0, 0);
        for i in 0..positions.len() {
            let p = positions[i];
            let here = self.is(p, a) & (self.is(p + 1, b) | self.is(p + stride, b));
            positions[kept] = p;
            kept += usize::from(here);
            for q in [p - stride, p + 2 * stride] {
                sum ^= self.cells.get(q as usize).map_or(0, |word| word.label());
            }
        }
        std::hint::black_box(sum);
        kept
    }

    /// The regions around two adjacent single cells: first those around `x`, then those around `y`, each group without
    /// the other cell.
    #[inline]
    pub fn around(&self, x: u32, y: u32, stride: u32) -> [Region; 6] {
        let positions = if y == x + 1 {
            [x - stride, x - 1, x + stride, y - stride, y + 1, y + stride]
        } else {
            [x - stride, x - 1, x + 1, y - 1, y + 1, y + stride]
        };
        positions.map(|position| self.region(position))
    }

    /// Visits the pairs of adjacent regions, as (anchor, anchor, token, token), in raster order of the first anchor, for
    /// those in rows that begin between two positions.
    pub fn for_each_pair(&self, from: usize, to: usize, visit: &mut impl FnMut(u32, u32, u32, u32)) {
        let mut found = Neighbours::default();
        for (i, &Stack { start, stride, .. }) in self.stacks.iter().enumerate() {
            let end = self.stacks.get(i + 1).map_or(self.cells.len(), |next| next.start as usize);
            let (start, stride) = (start as usize, stride as usize);
            let first = start + from.saturating_sub(start).next_multiple_of(stride);
            // The last row is border.
            for x in (first..to.min(end - stride)).step_by(stride) {
                let (row, below) = self.cells[x..x + 2 * stride].split_at(stride);
                // The last column is border.
                let (row, below) = (&row[..stride - 1], &below[..stride - 1]);
                if row[0].label() == u64::from(self.border) {
                    continue;
                }
                if self.single {
                    self.for_each_pair_of_cells(x as u32, row, below, visit);
                } else {
                    self.for_each_pair_of_regions(x as u32, row, below, &mut found, visit);
                }
            }
        }
    }

    #[inline]
    fn for_each_pair_of_cells(
        &self,
        start: u32,
        row: &[W],
        below: &[W],
        visit: &mut impl FnMut(u32, u32, u32, u32),
    ) {
        let token = |word: &W| word.label() as u32;
        let stride = row.len() as u32 + 1;
        let pairs = (start..).zip(row.iter().zip(&row[1..]));
        if token(&below[0]) == self.border {
            pairs.for_each(|(x, (a, right))| visit(x, x + 1, token(a), token(right)));
            return;
        }
        for ((x, (a, right)), c) in pairs.zip(below) {
            visit(x, x + 1, token(a), token(right));
            visit(x, x + stride, token(a), token(c));
        }
        let last = row.len() - 1;
        let x = start + last as u32;
        visit(x, x + stride, token(&row[last]), token(&below[last]));
    }

    fn for_each_pair_of_regions(
        &self,
        start: u32,
        row: &[W],
        below: &[W],
        found: &mut Neighbours,
        visit: &mut impl FnMut(u32, u32, u32, u32),
    ) {
        let stride = row.len() as u32 + 1;
        for (x, (&word, &below)) in (start..).zip(row.iter().zip(below)) {
            let label = word.label();
            if label >= u64::from(self.border) {
                // No anchor: at distance 0 the label is the token.
                continue;
            }
            let a = label as u32;
            if word.step() == 0 {
                // Whatever lies left of or above a single cell comes before it.
                let (right, b) = self.region(x + 1);
                let (below, c) = Self::region_of(x + stride, below);
                if b != self.border && right > x {
                    visit(x, right, a, b);
                }
                if c != self.border && below > x && below != right {
                    visit(x, below, a, c);
                }
            } else {
                self.neighbours(x, stride, found);
                for (y, b) in found.iter() {
                    if y > x {
                        visit(x, y, a, b);
                    }
                }
            }
        }
    }

    /// Joins region `y` to region `x`, both given by their anchors, `x < y`. The anchor is `x`.
    pub fn merge(&mut self, x: u32, y: u32, token: u32) {
        self.single = false;
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

    /// The same for two single cells.
    #[inline]
    pub fn merge_cells(&mut self, x: u32, y: u32, token: u32) {
        self.single = false;
        let distance = y - x;
        self.cells[x as usize] = W::new(token.into(), i64::from(distance));
        self.cells[y as usize] =
            W::new(u64::from(distance) << W::TOKEN_BITS | u64::from(token), -i64::from(distance));
    }

    fn link(&mut self, from: u32, to: u32) {
        let cell = &mut self.cells[from as usize];
        *cell = W::new(cell.label(), i64::from(to) - i64::from(from));
    }

    /// Makes `p` a cell of the region at `anchor`, right after the anchor in the ring.
    pub fn join(&mut self, anchor: u32, p: u32, token: u32) {
        self.single = false;
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

/// With more neighbours than this, sorting finds repeated ones.
const FEW: usize = 64;

/// Anchors that differ in these bits are told apart at once.
const SEEN: usize = 1 << 10;

/// No region is anchored here.
const NOWHERE: u32 = u32::MAX;

/// Regions adjacent to a region, each once.
#[derive(Debug)]
pub(super) struct Neighbours {
    /// The first `len` count, unless there are `many`.
    regions: [Region; FEW],
    len: usize,
    /// By the low bits of an anchor, whether it is among them.
    seen: [u32; SEEN],
    /// The anchor in the middle.
    middle: u32,
    /// If there are more, or two anchors have the same low bits, all in order.
    many: Vec<Region>,
}

impl Default for Neighbours {
    fn default() -> Self {
        Self { regions: [(0, 0); FEW], len: 0, seen: [NOWHERE; SEEN], middle: 0, many: Vec::new() }
    }
}

impl Neighbours {
    fn clear(&mut self) {
        for i in 0..self.len {
            self.seen[self.regions[i].0 as usize % SEEN] = NOWHERE;
        }
        self.seen[self.middle as usize % SEEN] = NOWHERE;
        self.len = 0;
        self.many.clear();
    }

    /// Keeps the region in the middle from being added.
    fn mark(&mut self, anchor: u32) {
        self.middle = anchor;
        self.seen[anchor as usize % SEEN] = anchor;
    }

    /// Adds a region if it is `wanted` and new. It is written in any case and kept by moving on, since a branch would be
    /// guessed wrong all the time. False if another region is in its way.
    #[inline]
    fn add(&mut self, region: Region, wanted: bool) -> bool {
        let seen = &mut self.seen[region.0 as usize % SEEN];
        let before = *seen;
        let fresh = (before != region.0) & wanted;
        if fresh & (before != NOWHERE) {
            return false;
        }
        *seen = if fresh { region.0 } else { before };
        self.regions[self.len % FEW] = region;
        self.len += usize::from(fresh);
        true
    }

    /// The regions found, as a slice.
    pub fn iter(&self) -> impl Iterator<Item = Region> {
        let found = if self.many.is_empty() { &self.regions[..self.len] } else { &self.many };
        found.iter().copied()
    }

    /// Number of regions.
    pub fn len(&self) -> usize {
        self.len + self.many.len()
    }

    /// Whether a region other than the one in the middle is here.
    #[inline]
    pub fn contains(&self, anchor: u32) -> bool {
        if self.many.is_empty() {
            self.seen[anchor as usize % SEEN] == anchor
        } else {
            self.many.binary_search_by_key(&anchor, |&(other, _)| other).is_ok()
        }
    }
}
