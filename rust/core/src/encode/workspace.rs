//! One grid while its rules are applied.
//!
//! Cells lie row after row with border cells around them, so a position is one number, positions are in raster order,
//! and every cell has four neighbours without a test for edges.
//!
//! Rules are taken in order. When a rule has made its token, the rules that join that token to one that is not newer are
//! marked; a rule's token is in no earlier rule, so every rule that can match is marked before its turn, and one pass
//! equals applying rule after rule. Only when a rule's turn has come are its pairs looked for, beside the regions of its
//! newer token, which were noted when they were made: most of them are gone by then, and a queue of pairs would have
//! been filled in vain. The pairs of single cells, which nothing made, are listed at the start.
//!
//! In pair mode every cell knows its region's token and anchor, and a region's cells form a ring. In oriented mode the
//! other region can only lie in one place, so tokens stand at anchors alone and nothing else is kept.

use super::merges::{Beside, Rules};
use super::{Dropout, EncodeOptions, Regions};
use crate::error::Result;
use crate::grid::Grid;
use crate::interrupt::Interrupt;
use crate::vocabulary::MergeMode;

/// The token where no region is: on the border, and in oriented mode wherever no anchor is.
const NOTHING: u32 = u32::MAX;

/// Marks the end of a list.
const END: u32 = u32::MAX;

/// Regions between two looks at the interrupt flag.
const CHECK_INTERVAL: usize = 1 << 12;

/// What encoding a grid needs, kept from grid to grid.
#[derive(Debug, Default)]
pub(crate) struct Sheet {
    height: usize,
    width: usize,
    stride: usize,
    oriented: bool,
    /// Per position, the token at the start, and in oriented mode the token of the region that has its anchor there.
    tokens: Vec<u32>,
    /// Per position, its region's token and anchor, packed (pair mode).
    cells: Vec<u64>,
    /// Per position in a region of several cells, the next of them (pair mode).
    next: Vec<u32>,
    /// Per position, which of its region's leaves it is (pair mode, if asked for).
    leaves: Vec<u32>,
    /// One bit per rule that may match. All 0 between grids.
    waiting: Vec<u64>,
    /// Per rule that joins two single cells, the first of its neighbours, or `END`. All `END` between grids. A neighbour is
    /// twice the position of a cell, plus 0 for it and the cell at its right, 1 for it and the cell below.
    first: Vec<u32>,
    /// Per neighbour, the next one of its rule, or `END`.
    after: Vec<u32>,
    /// Anchors of the regions that the rules have made, rule after rule, in raster order for each.
    made: Vec<u32>,
    num_made: usize,
    /// Per rule that has made regions in this grid, which part of `made` they are.
    made_by: Vec<(u32, u32)>,
    /// The pairs that a rule may join.
    found: Vec<u64>,
    num_found: usize,
}

/// Two anchors, or a region's token and anchor, as one number. Numbers are in order of the first, then of the second.
fn pack(x: u32, y: u32) -> u64 {
    u64::from(x) << 32 | u64::from(y)
}

fn unpack(packed: u64) -> (u32, u32) {
    ((packed >> 32) as u32, packed as u32)
}

/// The cells of a neighbour.
fn ends(neighbour: u32, stride: usize) -> (usize, usize) {
    let x = (neighbour / 2) as usize;
    (x, x + if neighbour.is_multiple_of(2) { 1 } else { stride })
}

fn mark(waiting: &mut [u64], rule: u32) {
    waiting[rule as usize / 64] |= 1 << (rule % 64);
}

/// Makes a list long enough for values that are written to always, and kept in it by counting on.
fn fit<T: Copy + Default>(list: &mut Vec<T>, len: usize) {
    if list.len() < len {
        list.resize(len.next_power_of_two(), T::default());
    }
}

/// One rule's turn.
#[derive(Clone, Copy)]
struct Turn {
    a: u32,
    b: u32,
    /// What the rule makes of them.
    token: u32,
    size_a: u32,
    size_b: u32,
    coin: Option<Coin>,
}

/// A rule's dropout in one grid.
#[derive(Clone, Copy)]
struct Coin {
    dropout: Dropout,
    index: u64,
    rule: u32,
    stride: u32,
    width: u32,
}

impl Turn {
    #[inline]
    fn skips(&self, x: u32, y: u32) -> bool {
        self.coin.is_some_and(|Coin { dropout, index, rule, stride, width }| {
            let cell = |p: u32| (p / stride - 1) * width + p % stride;
            dropout.skips(index, rule, cell(x), cell(y))
        })
    }
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
        let (stride, width) = (self.stride as u32, self.width as u32);
        for word in 0..rules.len().div_ceil(64) {
            // A rule marks later ones, perhaps in this very word.
            while self.waiting[word] != 0 {
                interrupt.check()?;
                let rule = word as u32 * 64 + self.waiting[word].trailing_zeros();
                self.waiting[word] &= self.waiting[word] - 1;
                let pair = rules.pair(rule);
                let turn = Turn {
                    a: pair.a,
                    b: pair.b,
                    token: rules.token(rule),
                    size_a: pair.size_a,
                    size_b: pair.size_b,
                    coin: options.dropout.map(|dropout| Coin { dropout, index, rule, stride, width }),
                };
                let start = self.num_made;
                let newer = pair.a.max(pair.b);
                if let Some(maker) = newer.checked_sub(rules.base_vocab_size) {
                    let (first, number) = self.made_by[maker as usize];
                    let regions = first as usize..(first + number) as usize;
                    if ORIENTED {
                        self.join_at_offset(rules, rule, &turn, regions);
                    } else if turn.a == newer {
                        self.join_around(&turn, regions, interrupt)?;
                    } else {
                        self.find_around(&turn, regions, interrupt)?;
                        self.join_found(&turn, interrupt)?;
                    }
                } else {
                    self.join_cells::<ORIENTED>(rule, &turn);
                }
                if self.num_made > start {
                    self.made_by[rule as usize] = (start as u32, (self.num_made - start) as u32);
                    for &partner in rules.partners(pair) {
                        mark(&mut self.waiting, partner);
                    }
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
            self.tokens.clear();
            self.tokens.resize(positions, NOTHING);
            self.cells.clear();
            self.next.clear();
            if !ORIENTED {
                self.cells.resize(positions, pack(NOTHING, 0));
                self.next.resize(positions, 0);
            }
            self.after.resize(2 * positions, END);
            // Every region that is made is of two, so there are fewer than cells.
            self.made.resize(height * width, 0);
        }
        self.leaves.clear();
        self.leaves.resize(if regions && !ORIENTED { positions } else { 0 }, 0);
        if self.first.len() < rules.len() {
            self.first.resize(rules.len(), END);
            self.made_by.resize(rules.len(), (0, 0));
            self.waiting.resize(rules.len().div_ceil(64), 0);
        }
        self.num_made = 0;
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
    }

    /// Lists the neighbouring cells that rules join, and marks those rules.
    fn find_neighbours(&mut self, rules: &Rules, interrupt: &Interrupt) -> Result<()> {
        let table = rules.base();
        let (stride, width) = (self.stride, self.width);
        let tokens = self.tokens.as_slice();
        // Backwards, since what is put before a list last will be its first.
        for row in (1..=self.height).rev().map(|row| row * stride) {
            interrupt.check()?;
            for start in (0..width).step_by(32).rev().map(|column| row + column) {
                let end = (start + 32).min(row + width);
                let (right, below) = (&tokens[start + 1..=end], &tokens[start + stride..end + stride]);
                // Two bits for each cell. No branches, which would be guessed wrong.
                let mut may_join = 0;
                for ((&a, &right), &below) in tokens[start..end].iter().zip(right).zip(below) {
                    may_join = may_join << 1 | table.may_join(a, right, Beside::Right);
                    may_join = may_join << 1 | table.may_join(a, below, Beside::Below);
                }
                while may_join != 0 {
                    let neighbour = 2 * end as u32 - 1 - may_join.trailing_zeros();
                    may_join &= may_join - 1;
                    let (x, y) = ends(neighbour, stride);
                    let beside = if neighbour.is_multiple_of(2) { Beside::Right } else { Beside::Below };
                    if let Some(rule) = table.get(tokens[x], tokens[y], beside) {
                        let next = std::mem::replace(&mut self.first[rule as usize], neighbour);
                        self.after[neighbour as usize] = next;
                        mark(&mut self.waiting, rule);
                    }
                }
            }
        }
        Ok(())
    }

    /// Joins single cells, as listed in the beginning.
    fn join_cells<const ORIENTED: bool>(&mut self, rule: u32, turn: &Turn) {
        let Turn { a, b, token, .. } = *turn;
        let mut neighbour = std::mem::replace(&mut self.first[rule as usize], END);
        let mut n = self.num_made;
        while neighbour != END {
            let (x, y) = ends(neighbour, self.stride);
            neighbour = self.after[neighbour as usize];
            // Only single cells have an id of the codebook.
            let token_at = |p: usize| if ORIENTED { self.tokens[p] } else { unpack(self.cells[p]).0 };
            let free = (token_at(x) == a) & (token_at(y) == b);
            let (at_x, at_y) = (x as u32, y as u32);
            if free && !turn.skips(at_x, at_y) {
                if ORIENTED {
                    (self.tokens[x], self.tokens[y]) = (token, NOTHING);
                } else {
                    (self.cells[x], self.cells[y]) = (pack(token, at_x), pack(token, at_x));
                    (self.next[x], self.next[y]) = (at_y, at_x);
                    if !self.leaves.is_empty() {
                        self.leaves[y] = 1;
                    }
                }
                self.made[n] = at_x;
                n += 1;
            }
        }
        self.num_made = n;
    }

    /// Oriented mode: the other region is at the rule's offset, or there is none.
    fn join_at_offset(&mut self, rules: &Rules, rule: u32, turn: &Turn, regions: std::ops::Range<usize>) {
        let Turn { a, b, token, .. } = *turn;
        let offset = rules.pair(rule).offset;
        let too_far = offset.dy as usize >= self.height || offset.dx.unsigned_abs() as usize >= self.width;
        if too_far || !rules.touches(rule, self.height * self.width) {
            return;
        }
        let step = (offset.dy as usize * self.stride).wrapping_add_signed(offset.dx as isize);
        let mut n = self.num_made;
        for i in regions {
            let made = self.made[i] as usize;
            let (x, y) = if a >= b { (made, made + step) } else { (made.wrapping_sub(step), made) };
            let is = |position: usize, token| self.tokens.get(position) == Some(&token);
            if is(x, a) & is(y, b) && !turn.skips(x as u32, y as u32) {
                self.tokens[x] = token;
                self.tokens[y] = NOTHING;
                self.made[n] = x as u32;
                n += 1;
            }
        }
        self.num_made = n;
    }

    /// Pair mode, a newer than b: joins each region of a to the first free one of b beside it.
    fn join_around(
        &mut self,
        turn: &Turn,
        regions: std::ops::Range<usize>,
        interrupt: &Interrupt,
    ) -> Result<()> {
        let stride = self.stride as u32;
        for (step, i) in regions.enumerate() {
            if step % CHECK_INTERVAL == 0 {
                interrupt.check()?;
            }
            let x = self.made[i];
            if self.cells[x as usize] != pack(turn.a, x) {
                continue;
            }
            // The distance from the first anchor that may be y; of cells in other regions a number that is larger than
            // any such distance.
            let least = pack(turn.b, x + 1);
            let mut distance = u64::MAX;
            let mut p = x;
            for _ in 0..turn.size_a {
                for q in [p - stride, p - 1, p + 1, p + stride] {
                    let to_q = self.cells[q as usize].wrapping_sub(least);
                    let skipped = turn.coin.is_some() && to_q < 1 << 31 && turn.skips(x, x + 1 + to_q as u32);
                    distance = distance.min(if skipped { u64::MAX } else { to_q });
                }
                p = self.next[p as usize];
            }
            if distance < 1 << 31 {
                self.link(turn, x, x + 1 + distance as u32);
            }
        }
        Ok(())
    }

    /// Pair mode, b newer than a: finds the pairs at all regions of b. Some may be there twice.
    fn find_around(
        &mut self,
        turn: &Turn,
        regions: std::ops::Range<usize>,
        interrupt: &Interrupt,
    ) -> Result<()> {
        let stride = self.stride as u32;
        let mut n = 0;
        for (step, &y) in self.made[regions].iter().enumerate() {
            if step % CHECK_INTERVAL == 0 {
                interrupt.check()?;
            }
            if self.cells[y as usize] != pack(turn.b, y) {
                continue;
            }
            fit(&mut self.found, n + 4 * turn.size_b as usize + 1);
            let mut p = y;
            for _ in 0..turn.size_b {
                for q in [p - stride, p - 1, p + 1, p + stride] {
                    let (token, x) = unpack(self.cells[q as usize]);
                    self.found[n] = pack(x, y);
                    n += usize::from(token == turn.a) & usize::from(x < y);
                }
                p = self.next[p as usize];
            }
        }
        let found = &mut self.found[..n];
        if !found.is_sorted() {
            found.sort_unstable();
        }
        self.num_found = n;
        Ok(())
    }

    /// Joins the pairs found, in order, that are still what they were.
    fn join_found(&mut self, turn: &Turn, interrupt: &Interrupt) -> Result<()> {
        for i in 0..self.num_found {
            if i % CHECK_INTERVAL == 0 {
                interrupt.check()?;
            }
            let (x, y) = unpack(self.found[i]);
            let free =
                (self.cells[x as usize] == pack(turn.a, x)) & (self.cells[y as usize] == pack(turn.b, y));
            if free && !turn.skips(x, y) {
                self.link(turn, x, y);
            }
        }
        Ok(())
    }

    /// Pair mode: makes two regions one.
    #[inline]
    fn link(&mut self, turn: &Turn, x: u32, y: u32) {
        let Turn { token, size_a, size_b, .. } = *turn;
        // A single cell has no next one written down.
        let next = self.next.as_mut_slice();
        let after = |p: u32, size: u32| if size == 1 { p } else { next[p as usize] };
        let (after_x, after_y) = (after(x, size_a), after(y, size_b));
        if !self.leaves.is_empty() {
            let mut p = y;
            for _ in 0..size_b {
                self.leaves[p as usize] += size_a;
                p = if size_b == 1 { p } else { next[p as usize] };
            }
        }
        // Two rings become one when one link of each is exchanged.
        next[x as usize] = after_y;
        next[y as usize] = after_x;
        let mut p = x;
        for _ in 0..size_a + size_b {
            self.cells[p as usize] = pack(token, x);
            p = next[p as usize];
        }
        self.made[self.num_made] = x;
        self.num_made += 1;
    }

    fn is_anchor<const ORIENTED: bool>(&self, position: usize) -> bool {
        if ORIENTED {
            self.tokens[position] != NOTHING
        } else {
            self.cells[position] as u32 == position as u32
        }
    }

    /// The positions of the cells, in raster order.
    fn positions(&self) -> impl Iterator<Item = usize> + use<> {
        let (width, stride) = (self.width, self.stride);
        (1..=self.height).flat_map(move |row| row * stride..row * stride + width)
    }

    /// Appends the tokens, in raster order of anchors.
    fn collect<const ORIENTED: bool>(&self, values: &mut Vec<u32>) {
        let start = values.len();
        values.resize(start + self.height * self.width, 0);
        let collected = &mut values[start..];
        let mut n = 0;
        for row in (1..=self.height).map(|row| row * self.stride) {
            if ORIENTED {
                for &token in &self.tokens[row..row + self.width] {
                    collected[n] = token;
                    n += usize::from(token != NOTHING);
                }
            } else {
                for (&cell, position) in self.cells[row..row + self.width].iter().zip(row as u32..) {
                    let (token, anchor) = unpack(cell);
                    collected[n] = token;
                    n += usize::from(anchor == position);
                }
            }
        }
        values.truncate(start + n);
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
            let cell = |p: usize| (index_at[unpack(self.cells[p]).1 as usize], self.leaves[p]);
            let (tokens, leaves) = self.positions().map(cell).unzip();
            Regions { tokens, leaves }
        }
    }
}
