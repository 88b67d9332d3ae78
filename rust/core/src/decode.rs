//! Decoding: tokens become a grid's ids again.

use crate::error::{Error, Result};
use crate::grid::{Offset, Regions, check_size};
use crate::memory;
use crate::vocabulary::{MergeMode, Vocabulary};

/// A cell that no token covers yet; no id is this large.
const EMPTY_CELL: u32 = u32::MAX;

impl Vocabulary {
    /// The codebook ids, in raster order, of the `height`x`width` grid that was encoded to `ids`.
    ///
    /// In oriented mode every token is placed with its anchor on the first free cell in raster order. In pair mode a
    /// token's shape is not fixed, so `regions` are needed; they work in oriented mode too.
    ///
    /// # Errors
    /// [`Error::Tokens`] naming the first token that does not fit, [`Error::Regions`] if the regions are missing or do
    /// not belong to the tokens, [`Error::GridSize`].
    pub fn decode(
        &self,
        ids: &[u32],
        height: usize,
        width: usize,
        regions: Option<&Regions>,
    ) -> Result<Vec<u32>> {
        check_size(0, height, width)?;
        memory::hold_reserve()?;
        for (position, &token) in ids.iter().enumerate() {
            self.check_token(position, token)?;
        }
        match (regions, self.merge_mode) {
            (Some(regions), _) => self.fill(ids, height * width, regions),
            (None, MergeMode::Oriented) => self.tile(ids, height, width),
            (None, MergeMode::Pair) => {
                let problem = "needed to decode in pair mode, where a token's shape is not fixed";
                Err(Error::Regions(problem.to_owned()))
            }
        }
    }

    /// The cells of a token as (offset from its anchor, id of the codebook), those of `a` before those of `b`.
    ///
    /// # Errors
    /// [`Error::Tokens`] if there is no such token, or it has no fixed shape (pair mode), or more cells than any grid.
    pub fn token_to_cells(&self, token: u32) -> Result<Vec<(Offset, u32)>> {
        let error = |problem: String| Error::Tokens { position: 0, problem };
        self.check_token(0, token)?;
        if self.merge_mode == MergeMode::Pair && token >= self.base_vocab_size {
            return Err(error(format!("token {token} has no fixed shape, since merge_mode is pair")));
        }
        let max_cells =
            self.grid_sizes.iter().map(|size| u64::from(size.height) * u64::from(size.width)).max();
        let (mut cells, mut room) = (Vec::new(), Ok(()));
        let fits = self.visit_leaves(token, |id, row, column| {
            let cell = (Offset { dy: row as i32, dx: column as i32 }, id);
            room = memory::push(&mut cells, cell, "the cells of a token");
            (room.is_ok() && cells.len() as u64 <= max_cells.unwrap_or(1)).then_some(())
        });
        room?;
        match fits {
            Some(()) => Ok(cells),
            None => {
                Err(error(format!("token {token} has more cells than the largest grid of the training set")))
            }
        }
    }

    /// The error for a number that is none of this vocabulary's tokens.
    #[must_use]
    pub fn token_error(&self, position: usize, token: i128) -> Error {
        let last = self.vocab_size() - 1;
        let problem = format!("token {token} is not in the vocabulary, expected 0 to {last}");
        Error::Tokens { position, problem }
    }

    fn check_token(&self, position: usize, token: u32) -> Result<()> {
        if token < self.vocab_size() { Ok(()) } else { Err(self.token_error(position, token.into())) }
    }

    /// Calls `visit` with (id, row, column) of each of a token's cells, as seen from its anchor, until it returns
    /// `None`.
    ///
    /// Rows and columns have a meaning in oriented mode only.
    fn visit_leaves(&self, token: u32, mut visit: impl FnMut(u32, i64, i64) -> Option<()>) -> Option<()> {
        let mut stack = vec![(token, 0, 0)];
        while let Some((token, row, column)) = stack.pop() {
            match self.merge_of(token) {
                None => visit(token, row, column)?,
                Some(merge) => {
                    let Offset { dy, dx } = merge.offset.unwrap_or(Offset { dy: 0, dx: 0 });
                    stack.push((merge.b, row + i64::from(dy), column + i64::from(dx)));
                    stack.push((merge.a, row, column));
                }
            }
        }
        Some(())
    }

    /// Oriented mode: tokens one after the other, each on the first free cell.
    fn tile(&self, ids: &[u32], height: usize, width: usize) -> Result<Vec<u32>> {
        let mut grid = memory::try_vec(height * width, EMPTY_CELL, "the decoded grid")?;
        let mut free = 0..grid.len();
        for (position, &token) in ids.iter().enumerate() {
            let error = |problem| Error::Tokens { position, problem };
            let Some(anchor) = free.find(|&cell| grid[cell] == EMPTY_CELL) else {
                return Err(error(format!(
                    "token {token} is one too many, the {height}x{width} grid is full"
                )));
            };
            let (top, left) = ((anchor / width) as i64, (anchor % width) as i64);
            // The token's cells as long as they are in the grid and free; `last` is the first that is not.
            let mut last = (0, 0);
            let fits = self.visit_leaves(token, |id, row, column| {
                last = (top + row, left + column);
                let row = usize::try_from(last.0).ok().filter(|&row| row < height)?;
                let column = usize::try_from(last.1).ok().filter(|&column| column < width)?;
                let cell = &mut grid[row * width + column];
                (*cell == EMPTY_CELL).then(|| *cell = id)
            });
            if fits.is_none() {
                let (row, column) = last;
                return Err(error(format!(
                    "token {token}, anchored at row {top}, column {left}, does not fit the {height}x{width} grid: \
                     the cell at row {row}, column {column} is outside or taken"
                )));
            }
        }
        // No cell may be left over.
        match free.find(|&cell| grid[cell] == EMPTY_CELL) {
            None => Ok(grid),
            Some(cell) => {
                let (row, column) = (cell / width, cell % width);
                let problem = format!("no token is left for the cell at row {row}, column {column}");
                Err(Error::Tokens { position: ids.len(), problem })
            }
        }
    }

    /// Any mode: every cell takes the leaf that the regions name.
    fn fill(&self, ids: &[u32], cells: usize, regions: &Regions) -> Result<Vec<u32>> {
        let error = |problem: String| Err(Error::Regions(problem));
        for (name, length) in [("tokens", regions.tokens.len()), ("leaves", regions.leaves.len())] {
            if length != cells {
                return error(format!("{length} {name} for {cells} cells"));
            }
        }
        // The leaves of all tokens, one token after the other.
        let mut leaves = memory::with_capacity(cells + 1, "the leaves of the tokens")?;
        let mut starts = memory::with_capacity(ids.len() + 1, "where tokens begin")?;
        for (position, &token) in ids.iter().enumerate() {
            starts.push(leaves.len());
            let fits = self.visit_leaves(token, |id, _, _| {
                leaves.push(id);
                (leaves.len() <= cells).then_some(())
            });
            if fits.is_none() {
                let problem = format!("token {token} covers more cells than are left of {cells}");
                return Err(Error::Tokens { position, problem });
            }
        }
        starts.push(leaves.len());
        if leaves.len() < cells {
            let problem = format!("the tokens cover {} cells of {cells}", leaves.len());
            return Err(Error::Tokens { position: ids.len(), problem });
        }
        // Each cell takes the leaf that the regions name, and each leaf is taken once.
        let mut leaf_is_taken = memory::try_vec(cells, false, "the leaves that are taken")?;
        let mut grid = memory::with_capacity(cells, "the decoded grid")?;
        for (cell, (&index, &leaf)) in regions.tokens.iter().zip(&regions.leaves).enumerate() {
            let (index, leaf) = (index as usize, leaf as usize);
            let Some(&[start, end]) = starts.get(index..).and_then(|starts| starts.first_chunk()) else {
                return error(format!("cell {cell} belongs to token {index} of {}", ids.len()));
            };
            if leaf >= end - start || std::mem::replace(&mut leaf_is_taken[start + leaf], true) {
                return error(format!(
                    "cell {cell}: leaf {leaf} of token {index} does not exist or is taken"
                ));
            }
            grid.push(leaves[start + leaf]);
        }
        Ok(grid)
    }
}
