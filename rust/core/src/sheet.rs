//! One grid while its rules are applied.
//!
//! Cells lie row after row with border cells around them, so a position is one number, positions are in raster order,
//! and every cell has four neighbours without a test for edges.
//!
//! Rules are taken in order. When a rule has made its token, the rules that join that token to one which is in the grid
//! are marked; a rule's token is in no earlier rule, so every rule that can match is marked before its turn, and one
//! pass equals applying rule after rule. Only when a rule's turn has come are its pairs looked for, beside the regions
//! of its newer token, which were noted when they were made: most of them are gone by then, and a queue of pairs would
//! have been filled in vain.
//!
//! In pair mode every cell knows its region's token and anchor, and a region's cells form a ring. In oriented mode the
//! other region can only lie in one place, so tokens stand at anchors alone and nothing else is kept.

use crate::encode::{Dropout, EncodeOptions, Regions};
use crate::error::Result;
use crate::grid::Grid;
use crate::interrupt::Interrupt;
use crate::rules::{Beside, Pair, Rules};
use crate::vocabulary::MergeMode;

/// The token where no region is: on the border, and in oriented mode wherever no anchor is.
const NOTHING: u32 = u32::MAX;

/// Marks the end of a list.
const END: u32 = u32::MAX;

/// Regions, rows or pairs between two looks at the interrupt flag.
const CHECK_INTERVAL: usize = 1 << 12;

/// What encoding a grid needs, kept from grid to grid.
#[derive(Debug, Default)]
pub(crate) struct Sheet {
    height: usize,
    width: usize,
    stride: usize,
    oriented: bool,
    /// Per position, the token of its region.
    tokens: Vec<u32>,
    /// Per position, its region's anchor (pair mode).
    anchors: Vec<u32>,
    /// Per position, the next cell of its region (pair mode).
    next: Vec<u32>,
    /// Per position, which of its region's leaves it is (pair mode, if asked for).
    leaves: Vec<u32>,
    /// Per token, the number of regions that have it. All zero between grids.
    counts: Vec<u32>,
    /// One bit per rule that may match. All zero between grids.
    waiting: Vec<u64>,
    /// Per rule that joins two single cells, its last entry in the list below, or `END`. All `END` between grids.
    last: Vec<u32>,
    /// Neighbouring cells, each with the entry of its rule before it.
    entries: Vec<(u32, u32)>,
    /// Anchors of the regions that the rules have made, rule after rule.
    made: Vec<u32>,
    /// Per rule that has made regions in this grid, which part of `made` they are.
    made_by: Vec<(u32, u32)>,
    /// The cells whose right or lower neighbour the filter of rules lets pass: twice the position, plus 1 for lower.
    neighbours: List<u32>,
    /// The pairs that a rule may join.
    found: List<u64>,
    /// The pairs that a rule has joined.
    joined: List<u64>,
}

/// A list that values are written to always and kept in by moving on, where a branch would be guessed wrong.
#[derive(Debug, Default)]
struct List<T> {
    values: Vec<T>,
    len: usize,
}

impl<T: Copy + Default> List<T> {
    fn as_slice(&self) -> &[T] {
        &self.values[..self.len]
    }

    /// Appends those of at most `most` values that `fill` keeps. It works on a slice in registers, one longer than
    /// `most`, and returns the number of values kept.
    #[inline]
    fn append(&mut self, most: usize, fill: impl FnOnce(&mut [T]) -> usize) {
        let end = self.len + most + 1;
        if self.values.len() < end {
            self.values.resize(end.next_power_of_two(), T::default());
        }
        self.len += fill(&mut self.values[self.len..end]);
    }
}

/// Two anchors as one number; numbers are in raster order of the first, then of the second.
fn pack(x: u32, y: u32) -> u64 {
    u64::from(x) << 32 | u64::from(y)
}

fn unpack(anchors: u64) -> (u32, u32) {
    ((anchors >> 32) as u32, anchors as u32)
}

impl Sheet {
    /// Appends a grid's tokens to `values`. Grid `index` of a batch has its own dropout. After an error the sheet must
    /// not be used again.
    pub fn encode(
        &mut self,
        rules: &Rules,
        grid: &Grid,
        index: u64,
        options: &EncodeOptions,
        interrupt: &Interrupt,
        values: &mut Vec<u32>,
    ) -> Result<Option<Regions>> {
        match rules.merge_mode {
            MergeMode::Pair => self.run::<false>(rules, grid, index, options, interrupt, values),
            MergeMode::Oriented => self.run::<true>(rules, grid, index, options, interrupt, values),
        }
    }

    /// Number of positions that memory is held for.
    pub fn capacity(&self) -> usize {
        self.tokens.capacity()
    }

    fn run<const ORIENTED: bool>(
        &mut self,
        rules: &Rules,
        grid: &Grid,
        index: u64,
        options: &EncodeOptions,
        interrupt: &Interrupt,
        values: &mut Vec<u32>,
    ) -> Result<Option<Regions>> {
        self.lay_out::<ORIENTED>(rules, grid, options.regions);
        self.find_neighbours(rules, interrupt)?;
        for word in 0..rules.len().div_ceil(64) {
            while self.waiting[word] != 0 {
                interrupt.check()?;
                let rule = word as u32 * 64 + self.waiting[word].trailing_zeros();
                self.waiting[word] &= self.waiting[word] - 1;
                let pair = rules.pair(rule);
                self.find::<ORIENTED>(rules, rule, pair, interrupt)?;
                let coin = options.dropout.map(|dropout| (dropout, index));
                self.join::<ORIENTED>(pair, rule, rules.token(rule), coin);
                if self.joined.len > 0 {
                    if !ORIENTED {
                        self.link(rules, pair, rules.token(rule), interrupt)?;
                    }
                    self.note(rules, pair, rule);
                }
            }
        }
        let start = values.len();
        self.collect::<ORIENTED>(values);
        Ok(options.regions.then(|| self.regions::<ORIENTED>(rules, &values[start..])))
    }

    /// Starts with a grid, every cell a region of its own.
    fn lay_out<const ORIENTED: bool>(&mut self, rules: &Rules, grid: &Grid, regions: bool) {
        let (height, width) = (grid.height() as usize, grid.width() as usize);
        // As wide a border as the grid, so that an offset from a cell leads to another of its columns or to none.
        let stride = if ORIENTED { 2 * width } else { width + 1 };
        let positions = (height + 2) * stride;
        if (self.height, self.width, self.oriented) != (height, width, ORIENTED) {
            (self.height, self.width, self.stride, self.oriented) = (height, width, stride, ORIENTED);
            let planes = [(&mut self.tokens, NOTHING), (&mut self.anchors, 0), (&mut self.next, 0)];
            for (plane, border) in planes.into_iter().take(if ORIENTED { 1 } else { 3 }) {
                plane.clear();
                plane.resize(positions, border);
            }
        }
        self.leaves.clear();
        self.leaves.resize(if regions && !ORIENTED { positions } else { 0 }, 0);

        let tokens = rules.token(rules.len() as u32) as usize;
        if self.counts.len() < tokens {
            self.counts.resize(tokens, 0);
        }
        if self.last.len() < rules.len() {
            self.last.resize(rules.len(), END);
            self.made_by.resize(rules.len(), (0, 0));
            self.waiting.resize(rules.len().div_ceil(64), 0);
        }
        self.entries.clear();
        self.made.clear();

        for (row, ids) in (1..).zip(grid.ids().chunks_exact(width)) {
            let cells = row * stride..row * stride + width;
            self.tokens[cells.clone()].copy_from_slice(ids);
            if !ORIENTED {
                for plane in [&mut self.anchors, &mut self.next] {
                    for (cell, position) in plane[cells.clone()].iter_mut().zip(cells.start as u32..) {
                        *cell = position;
                    }
                }
            }
            for &id in ids {
                self.counts[id as usize] += 1;
            }
        }
    }

    /// Lists the neighbouring cells that rules join, and marks those rules.
    fn find_neighbours(&mut self, rules: &Rules, interrupt: &Interrupt) -> Result<()> {
        let table = rules.base();
        let (stride, width) = (self.stride, self.width);
        let tokens = self.tokens.as_slice();
        self.neighbours.len = 0;
        for start in (1..=self.height).map(|row| row * stride) {
            interrupt.check()?;
            let row = &tokens[start..=start + width];
            let below = &tokens[start + stride..][..width];
            self.neighbours.append(2 * width, |found| {
                let mut n = 0;
                for (((&a, &right), &below), position) in
                    row.iter().zip(&row[1..]).zip(below).zip(start as u32..)
                {
                    found[n] = position * 2;
                    n += usize::from(table.may_join(a, right, Beside::Right));
                    found[n] = position * 2 + 1;
                    n += usize::from(table.may_join(a, below, Beside::Below));
                }
                n
            });
        }
        // Backwards, since the last entry of a list is the first to be taken.
        for &neighbour in self.neighbours.as_slice().iter().rev() {
            let x = (neighbour / 2) as usize;
            let (y, beside) =
                if neighbour % 2 == 0 { (x + 1, Beside::Right) } else { (x + stride, Beside::Below) };
            if let Some(rule) = table.get(tokens[x], tokens[y], beside) {
                let entry = self.entries.len() as u32;
                let before = std::mem::replace(&mut self.last[rule as usize], entry);
                self.entries.push((neighbour, before));
                self.waiting[rule as usize / 64] |= 1 << (rule % 64);
            }
        }
        Ok(())
    }

    /// Finds the pairs that a rule may join, in raster order. Some may be there twice.
    fn find<const ORIENTED: bool>(
        &mut self,
        rules: &Rules,
        rule: u32,
        pair: &Pair,
        interrupt: &Interrupt,
    ) -> Result<()> {
        self.found.len = 0;
        let newer = pair.a.max(pair.b);
        let Some(maker) = newer.checked_sub(rules.base_vocab_size) else {
            self.take_neighbours(rule);
            return Ok(());
        };
        if self.counts[pair.a as usize] == 0 || self.counts[pair.b as usize] == 0 {
            return Ok(());
        }
        let (first, number) = self.made_by[maker as usize];
        let regions = first as usize..(first + number) as usize;
        if ORIENTED {
            self.look_at_offset(pair, regions);
            if self.found.len > 0 && !rules.touches(rule) {
                self.found.len = 0;
            }
        } else {
            self.look_around(pair, regions, rules.size(newer) as usize, interrupt)?;
        }
        let found = &mut self.found.values[..self.found.len];
        if !found.is_sorted() {
            found.sort_unstable();
        }
        Ok(())
    }

    /// The pairs of single cells, as listed in the beginning.
    fn take_neighbours(&mut self, rule: u32) {
        let mut entry = std::mem::replace(&mut self.last[rule as usize], END);
        while entry != END {
            let (neighbour, before) = self.entries[entry as usize];
            let x = neighbour / 2;
            let y = if neighbour % 2 == 0 { x + 1 } else { x + self.stride as u32 };
            self.found.append(1, |found| {
                found[0] = pack(x, y);
                1
            });
            entry = before;
        }
    }

    /// Oriented mode: the other region is at the rule's offset, or there is none.
    fn look_at_offset(&mut self, pair: &Pair, regions: std::ops::Range<usize>) {
        let Pair { a, b, offset, .. } = *pair;
        if offset.dy as usize >= self.height || offset.dx.unsigned_abs() as usize >= self.width {
            return;
        }
        let step = (offset.dy as usize * self.stride).wrapping_add_signed(offset.dx as isize);
        let tokens = self.tokens.as_slice();
        let is = |position: usize, token| tokens.get(position) == Some(&token);
        let made = &self.made[regions];
        self.found.append(made.len(), |found| {
            let mut n = 0;
            for &made in made {
                let made = made as usize;
                let (x, y) = if a >= b { (made, made + step) } else { (made.wrapping_sub(step), made) };
                found[n] = pack(x as u32, y as u32);
                n += usize::from(is(x, a) & is(y, b));
            }
            n
        });
    }

    /// Pair mode: the neighbours of all regions of the newer token, each of so many cells.
    fn look_around(
        &mut self,
        pair: &Pair,
        regions: std::ops::Range<usize>,
        size: usize,
        interrupt: &Interrupt,
    ) -> Result<()> {
        let (tokens, anchors, next) = (self.tokens.as_slice(), self.anchors.as_slice(), self.next.as_slice());
        let stride = self.stride as u32;
        let (newer, older) = (pair.a.max(pair.b), pair.a.min(pair.b));
        for (step, &made) in self.made[regions].iter().enumerate() {
            if step % CHECK_INTERVAL == 0 {
                interrupt.check()?;
            }
            if tokens[made as usize] != newer {
                continue;
            }
            self.found.append(4 * size, |found| {
                let mut n = 0;
                let mut p = made;
                for _ in 0..size {
                    for q in [p - stride, p - 1, p + 1, p + stride] {
                        found[n] = pack(made, q);
                        n += usize::from(tokens[q as usize] == older);
                    }
                    p = next[p as usize];
                }
                n
            });
        }
        // Of the neighbours with the right token, those on the right side.
        let found = &mut self.found.values[..self.found.len];
        let mut kept = 0;
        for i in 0..found.len() {
            let (made, q) = unpack(found[i]);
            let other = anchors[q as usize];
            let (x, y) = if pair.a == newer { (made, other) } else { (other, made) };
            found[kept] = pack(x, y);
            kept += usize::from(x < y);
        }
        self.found.len = kept;
        Ok(())
    }

    /// Joins the pairs found, in order, that are still what they were and that the coin does not skip.
    fn join<const ORIENTED: bool>(
        &mut self,
        pair: &Pair,
        rule: u32,
        token: u32,
        coin: Option<(Dropout, u64)>,
    ) {
        let Pair { a, b, .. } = *pair;
        let stride = self.stride as u32;
        let width = self.width as u32;
        let cell = |p: u32| (p / stride - 1) * width + p % stride;
        let consumed = if ORIENTED { NOTHING } else { token };
        self.joined.len = 0;
        let (tokens, found) = (self.tokens.as_mut_slice(), self.found.as_slice());
        self.joined.append(found.len(), |joined| {
            let mut n = 0;
            for &anchors in found {
                let (x, y) = unpack(anchors);
                let (at_x, at_y) = (tokens[x as usize], tokens[y as usize]);
                let mut both = pack(at_x, at_y) == pack(a, b);
                if let Some((dropout, index)) = coin {
                    both = both && !dropout.skips(index, rule, cell(x), cell(y));
                }
                tokens[x as usize] = if both { token } else { at_x };
                tokens[y as usize] = if both { consumed } else { at_y };
                joined[n] = anchors;
                n += usize::from(both);
            }
            n
        });
    }

    /// Pair mode: tells all cells of the joined regions.
    fn link(&mut self, rules: &Rules, pair: &Pair, token: u32, interrupt: &Interrupt) -> Result<()> {
        let (tokens, anchors) = (self.tokens.as_mut_slice(), self.anchors.as_mut_slice());
        let (next, leaves) = (self.next.as_mut_slice(), self.leaves.as_mut_slice());
        let (size_a, size_b) = (rules.size(pair.a), rules.size(pair.b));
        for (step, &both) in self.joined.as_slice().iter().enumerate() {
            if step % CHECK_INTERVAL == 0 {
                interrupt.check()?;
            }
            let (x, y) = unpack(both);
            if !leaves.is_empty() {
                let mut p = y;
                for _ in 0..size_b {
                    leaves[p as usize] += size_a;
                    p = next[p as usize];
                }
            }
            // Two rings become one when one link of each is exchanged.
            let (after_x, after_y) = (next[x as usize], next[y as usize]);
            next[x as usize] = after_y;
            next[y as usize] = after_x;
            let mut p = x;
            for _ in 0..size_a + size_b {
                tokens[p as usize] = token;
                anchors[p as usize] = x;
                p = next[p as usize];
            }
        }
        Ok(())
    }

    /// Notes the regions just made, and marks the rules for them whose other token is there.
    fn note(&mut self, rules: &Rules, pair: &Pair, rule: u32) {
        let number = self.joined.len as u32;
        self.made_by[rule as usize] = (self.made.len() as u32, number);
        self.made.extend(self.joined.as_slice().iter().map(|&anchors| unpack(anchors).0));
        let token = rules.token(rule);
        self.counts[pair.a as usize] -= number;
        self.counts[pair.b as usize] -= number;
        self.counts[token as usize] += number;
        for partner in rules.partners(pair) {
            let there = self.counts[partner.older as usize] > 0;
            self.waiting[partner.rule as usize / 64] |= u64::from(there) << (partner.rule % 64);
        }
    }

    fn is_anchor<const ORIENTED: bool>(&self, position: usize) -> bool {
        if ORIENTED { self.tokens[position] != NOTHING } else { self.anchors[position] as usize == position }
    }

    /// The positions of the cells, in raster order.
    fn positions(&self) -> impl Iterator<Item = usize> + use<> {
        let (width, stride) = (self.width, self.stride);
        (1..=self.height).flat_map(move |row| row * stride..row * stride + width)
    }

    /// Appends the tokens, in raster order of anchors.
    fn collect<const ORIENTED: bool>(&mut self, values: &mut Vec<u32>) {
        let start = values.len();
        values.resize(start + self.height * self.width, 0);
        let collected = &mut values[start..];
        let mut n = 0;
        for row in 1..=self.height {
            for position in row * self.stride..row * self.stride + self.width {
                collected[n] = self.tokens[position];
                n += usize::from(self.is_anchor::<ORIENTED>(position));
            }
        }
        values.truncate(start + n);
        for &token in &values[start..] {
            self.counts[token as usize] = 0;
        }
    }

    /// Which of these tokens, just collected, covers which cell.
    fn regions<const ORIENTED: bool>(&self, rules: &Rules, ids: &[u32]) -> Regions {
        let anchors = self.positions().filter(|&position| self.is_anchor::<ORIENTED>(position));
        let numbered = (0..).zip(anchors);
        if ORIENTED {
            let mut regions = Regions::default();
            regions.tokens.resize(self.height * self.width, 0);
            regions.leaves.resize(self.height * self.width, 0);
            for ((index, anchor), &token) in numbered.zip(ids) {
                let (row, column) = (anchor / self.stride - 1, anchor % self.stride);
                for (leaf, offset) in (0..).zip(rules.cells(token)) {
                    let cell = (row + offset.dy as usize) * self.width;
                    let cell = (cell + column).wrapping_add_signed(offset.dx as isize);
                    regions.tokens[cell] = index;
                    regions.leaves[cell] = leaf;
                }
            }
            regions
        } else {
            let mut index_at = vec![0; self.tokens.len()];
            for (index, anchor) in numbered {
                index_at[anchor] = index;
            }
            let cell = |p: usize| (index_at[self.anchors[p] as usize], self.leaves[p]);
            let (tokens, leaves) = self.positions().map(cell).unzip();
            Regions { tokens, leaves }
        }
    }
}
