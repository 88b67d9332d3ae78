//! A learned vocabulary: the merges in order, how they were learned, and the file that keeps them.

use rustc_hash::FxHashSet;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::grid::Offset;
use crate::limits::{MAX_SIDE, MAX_VOCAB_SIZE};
use crate::memory;

const FORMAT: &str = "being-vl/visual-bpe";
const VERSION: u32 = 1;

/// What memory is for, in messages.
const MERGES: &str = "the merges of the vocabulary";

/// Most bytes around a line of the file, and after the last one.
const MAX_LINE_ENDS: usize = 64;

/// With more bytes than this, a vocabulary file is read only if there is memory for the most that it may need.
const MAX_SMALL_FILE: usize = 1 << 16;

/// Bytes of memory, at most, per byte of a file: its merges as lines and as merges, in lists that double as they grow.
const MEMORY_PER_BYTE: usize = 6;

/// What a merge matches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MergeMode {
    /// A pair of tokens at any offset (Algorithm 1 of the paper).
    Pair,
    /// A pair of tokens at one offset, so that every token has a fixed shape and encoding is lossless.
    Oriented,
}

/// The quantizer whose ids a vocabulary was learned on.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Quantizer {
    /// Its name.
    pub name: Option<String>,
    /// A hash of its codebook.
    pub fingerprint: Option<String>,
}

/// How many grids of one size a vocabulary was learned on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GridSize {
    /// Rows.
    pub height: u32,
    /// Columns.
    pub width: u32,
    /// Number of grids.
    pub grids: u64,
}

/// One merge `(a, b) → new token`, with the pair's statistics at the time it was chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Merge {
    /// Token of the region whose anchor comes first.
    pub a: u32,
    /// Token of the other region.
    pub b: u32,
    /// In oriented mode, where `b`'s anchor lies as seen from `a`'s; `None` in pair mode.
    pub offset: Option<Offset>,
    /// Number of adjacent pairs at any offset (N).
    pub count: u64,
    /// Number of adjacent pairs at the most frequent offset.
    pub offset_count: u64,
    /// Spatial consistency (S).
    pub consistency: f64,
}

/// The merges of a visual BPE and how they were learned. Every vocabulary in memory has been checked.
#[derive(Debug, Clone, PartialEq)]
pub struct Vocabulary {
    pub(crate) base_vocab_size: u32,
    pub(crate) merge_mode: MergeMode,
    pub(crate) alpha: f64,
    pub(crate) sigma: f64,
    pub(crate) min_frequency: u64,
    pub(crate) quantizer: Quantizer,
    pub(crate) grid_sizes: Vec<GridSize>,
    pub(crate) merges: Vec<Merge>,
}

impl Vocabulary {
    /// Number of ids in the codebook (K).
    #[must_use]
    pub fn base_vocab_size(&self) -> u32 {
        self.base_vocab_size
    }

    /// Number of tokens: codebook ids and one per merge.
    #[must_use]
    pub fn vocab_size(&self) -> u32 {
        self.base_vocab_size + self.merges.len() as u32
    }

    /// What the merges match.
    #[must_use]
    pub fn merge_mode(&self) -> MergeMode {
        self.merge_mode
    }

    /// Weight of spatial consistency in the priority.
    #[must_use]
    pub fn alpha(&self) -> f64 {
        self.alpha
    }

    /// Width of the kernel of spatial consistency, in cells.
    #[must_use]
    pub fn sigma(&self) -> f64 {
        self.sigma
    }

    /// Least frequency that a pair needed to be merged.
    #[must_use]
    pub fn min_frequency(&self) -> u64 {
        self.min_frequency
    }

    /// The quantizer whose ids the vocabulary was learned on.
    #[must_use]
    pub fn quantizer(&self) -> &Quantizer {
        &self.quantizer
    }

    /// Sizes of the grids that the vocabulary was learned on, ascending.
    #[must_use]
    pub fn grid_sizes(&self) -> &[GridSize] {
        &self.grid_sizes
    }

    /// The merges in the order learned; merge `i` makes token `base_vocab_size + i`.
    #[must_use]
    pub fn merges(&self) -> &[Merge] {
        &self.merges
    }

    /// The merge that made a token, or `None` for an id of the codebook.
    pub(crate) fn merge_of(&self, token: u32) -> Option<&Merge> {
        self.merges.get(token.checked_sub(self.base_vocab_size)? as usize)
    }

    /// Number of cells that each merge's token covers, at most `u64::MAX`.
    pub(crate) fn merged_sizes(&self) -> Result<Vec<u64>> {
        let mut sizes: Vec<u64> = memory::with_capacity(self.merges.len(), MERGES)?;
        for merge in &self.merges {
            let size = |token: u32| token.checked_sub(self.base_vocab_size).map_or(1, |i| sizes[i as usize]);
            sizes.push(size(merge.a).saturating_add(size(merge.b)));
        }
        Ok(sizes)
    }

    /// The vocabulary file's content: JSON with one merge per line.
    ///
    /// # Errors
    /// [`Error::Memory`].
    pub fn to_json(&self) -> Result<String> {
        let mut text = self.text_without_checksum()?;
        let checksum = checksum(&text);
        text.extend([",\n  \"checksum\": \"", &checksum, "\"\n}\n"]);
        Ok(text)
    }

    /// The file up to its checksum.
    fn text_without_checksum(&self) -> Result<String> {
        let format = |error: serde_json::Error| Error::Format(error.to_string());
        let file = FileContent {
            format: FORMAT.to_owned(),
            version: VERSION,
            base_vocab_size: self.base_vocab_size,
            merge_mode: self.merge_mode,
            alpha: self.alpha,
            sigma: self.sigma,
            min_frequency: self.min_frequency,
            quantizer: self.quantizer.clone(),
            num_grids: self.grid_sizes.iter().map(|size| size.grids).sum(),
            grid_sizes: self.grid_sizes.clone(),
            num_merges: self.merges.len() as u64,
            merges: Vec::new(),
            checksum: None,
        };
        // All but the merges, as readable JSON.
        let mut text = serde_json::to_string_pretty(&file).map_err(format)?;
        // Its end, an empty list of merges, gives way to the merges, one per line.
        text.truncate(text.len() - "]\n}".len());
        for (index, merge) in self.merges.iter().enumerate() {
            let line = serde_json::to_string(&MergeLine::from(merge)).map_err(format)?;
            let bytes = text.len() + line.len() + MAX_LINE_ENDS;
            text.try_reserve(line.len() + MAX_LINE_ENDS)
                .map_err(|_| Error::Memory { bytes, purpose: "the text of the vocabulary" })?;
            text.push_str(if index == 0 { "\n    " } else { ",\n    " });
            text.push_str(&line);
        }
        text.push_str(if self.merges.is_empty() { "]" } else { "\n  ]" });
        Ok(text)
    }

    /// Reads the content of a vocabulary file and checks all of it.
    ///
    /// # Errors
    /// [`Error::Format`], [`Error::Option`], [`Error::VocabularySize`] or [`Error::Merge`], saying where;
    /// [`Error::Memory`].
    pub fn from_json(text: &str) -> Result<Self> {
        memory::hold_reserve()?;
        // The reader of JSON has no error for missing memory.
        if text.len() > MAX_SMALL_FILE {
            drop(memory::with_capacity::<u8>(text.len().saturating_mul(MEMORY_PER_BYTE), MERGES)?);
        }
        let format = |error: serde_json::Error| Error::Format(error.to_string());
        // Format and version first: another version may have other fields.
        let FormatAndVersion { format: name, version } = serde_json::from_str(text).map_err(format)?;
        if name != FORMAT {
            return Err(Error::Format(format!("its format is {name:?}, expected {FORMAT:?}")));
        }
        if version != VERSION {
            return Err(Error::Format(format!("its version is {version}, this program reads {VERSION}")));
        }
        let file: FileContent = serde_json::from_str(text).map_err(format)?;
        // What the file says of itself must agree with what it holds.
        if file.num_merges != file.merges.len() as u64 {
            let (num_merges, length) = (file.num_merges, file.merges.len());
            return Err(Error::Format(format!("num_merges is {num_merges}, but there are {length} merges")));
        }
        check_grid_sizes(&file)?;
        let merge = |(merge, line): (usize, &MergeLine)| {
            line.merge(file.merge_mode).map_err(|problem| Error::Merge { merge, problem })
        };
        let mut merges = memory::with_capacity(file.merges.len(), MERGES)?;
        for merge in file.merges.iter().enumerate().map(merge) {
            merges.push(merge?);
        }
        let vocabulary = Self {
            base_vocab_size: file.base_vocab_size,
            merge_mode: file.merge_mode,
            alpha: file.alpha,
            sigma: file.sigma,
            min_frequency: file.min_frequency,
            quantizer: file.quantizer,
            grid_sizes: file.grid_sizes,
            merges,
        };
        vocabulary.check()?;
        // A file without a checksum was edited on purpose; one with it must be as it was written.
        if let Some(recorded_checksum) = file.checksum {
            let content_checksum = checksum(&vocabulary.text_without_checksum()?);
            if recorded_checksum != content_checksum {
                return Err(Error::Format(format!(
                    "it was altered: its checksum is {recorded_checksum:?}, but its content has {content_checksum:?}"
                )));
            }
        }
        Ok(vocabulary)
    }

    /// Makes sure that the options are legal and that every merge can be applied.
    fn check(&self) -> Result<()> {
        check_options(self.base_vocab_size, self.merges.len(), self.alpha, self.sigma, self.min_frequency)?;
        let mut pairs = FxHashSet::default();
        let bytes = self.merges.len() * size_of::<(u32, u32, Option<Offset>)>();
        pairs.try_reserve(self.merges.len()).map_err(|_| Error::Memory { bytes, purpose: MERGES })?;
        for (i, merge) in self.merges.iter().enumerate() {
            let tokens = self.base_vocab_size + i as u32;
            // A merge may only join tokens that were made before it, and each pair once.
            let problem = if merge.a >= tokens || merge.b >= tokens {
                let (name, token) = if merge.a >= tokens { ("a", merge.a) } else { ("b", merge.b) };
                Some(format!("{name} = {token} is not an earlier token, expected 0 to {}", tokens - 1))
            } else if !pairs.insert((merge.a, merge.b, merge.offset)) {
                Some("the same merge stands earlier in the list".to_owned())
            } else {
                merge.problem()
            };
            if let Some(problem) = problem {
                return Err(Error::Merge { merge: i, problem });
            }
        }
        Ok(())
    }
}

impl Merge {
    /// What is wrong with the merge's own numbers, if anything is.
    fn problem(&self) -> Option<String> {
        if let Some(Offset { dy, dx }) = self.offset {
            let side = MAX_SIDE as i32;
            let leads_on = dy > 0 || dy == 0 && dx > 0;
            if !leads_on || dy >= side || dx >= side || dx <= -side {
                return Some(format!("offset ({dy}, {dx}) does not lead to a later cell of a grid"));
            }
        }
        let Self { count, offset_count, consistency, .. } = *self;
        if offset_count == 0 || offset_count > count {
            return Some(format!("n_offset = {offset_count} is not in 1 to n = {count}"));
        }
        if !(0.0..=1.0).contains(&consistency) {
            return Some(format!("s = {consistency} is not in 0 to 1"));
        }
        None
    }
}

/// Makes sure that a vocabulary may be learned with these options, or may have been.
pub(crate) fn check_options(
    base_vocab_size: u32,
    num_merges: usize,
    alpha: f64,
    sigma: f64,
    min_frequency: u64,
) -> Result<()> {
    let option_error = |name, value, expected| Err(Error::Option { name, value, expected });
    if base_vocab_size == 0 {
        return option_error("base_vocab_size", "0".to_owned(), "at least 1");
    }
    if base_vocab_size as usize + num_merges > MAX_VOCAB_SIZE as usize {
        return Err(Error::VocabularySize { base_vocab_size, num_merges });
    }
    if !(alpha.is_finite() && alpha >= 0.0) {
        return option_error("alpha", alpha.to_string(), "a finite number of at least 0");
    }
    let two_variances = 2.0 * (sigma * sigma);
    if !(sigma > 0.0 && two_variances.is_normal()) {
        return option_error("sigma", sigma.to_string(), "a positive number of ordinary size");
    }
    if min_frequency == 0 {
        return option_error("min_frequency", "0".to_owned(), "at least 1");
    }
    Ok(())
}

/// FNV-1a, 64 bits: finds accidents such as a changed digit, not forgeries.
fn checksum(text: &str) -> String {
    let hash = text.bytes().fold(0xCBF2_9CE4_8422_2325, |hash: u64, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01B3)
    });
    format!("{hash:016x}")
}

fn check_grid_sizes(file: &FileContent) -> Result<()> {
    let side = MAX_SIDE as u32;
    let mut total = 0_u64;
    for (i, size) in file.grid_sizes.iter().enumerate() {
        let GridSize { height, width, grids } = *size;
        let sides = 1..=side;
        if !sides.contains(&height) || !sides.contains(&width) || grids == 0 {
            let problem = format!("grid_sizes[{i}]: {grids} grids of {height}x{width} cannot be");
            return Err(Error::Format(problem));
        }
        total = total.saturating_add(grids);
    }
    if total != file.num_grids {
        let num_grids = file.num_grids;
        return Err(Error::Format(format!("num_grids is {num_grids}, but grid_sizes add up to {total}")));
    }
    Ok(())
}

/// The two fields that every version of the format has.
#[derive(Deserialize)]
struct FormatAndVersion {
    format: String,
    version: u32,
}

/// The file's fields.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileContent {
    format: String,
    version: u32,
    base_vocab_size: u32,
    merge_mode: MergeMode,
    alpha: f64,
    sigma: f64,
    min_frequency: u64,
    quantizer: Quantizer,
    num_grids: u64,
    grid_sizes: Vec<GridSize>,
    num_merges: u64,
    // Last of what serde writes: `to_json` writes the merges itself, and the checksum after them.
    merges: Vec<MergeLine>,
    #[serde(default, skip_serializing)]
    checksum: Option<String>,
}

/// A merge as the file has it.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct MergeLine {
    a: u32,
    b: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    dy: Option<i32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    dx: Option<i32>,
    n: u64,
    n_offset: u64,
    s: f64,
}

impl From<&Merge> for MergeLine {
    fn from(merge: &Merge) -> Self {
        Self {
            a: merge.a,
            b: merge.b,
            dy: merge.offset.map(|offset| offset.dy),
            dx: merge.offset.map(|offset| offset.dx),
            n: merge.count,
            n_offset: merge.offset_count,
            s: merge.consistency,
        }
    }
}

impl MergeLine {
    /// The merge, or what is wrong with it in this mode.
    fn merge(&self, mode: MergeMode) -> std::result::Result<Merge, String> {
        let offset = match (mode, self.dy, self.dx) {
            (MergeMode::Pair, None, None) => None,
            (MergeMode::Oriented, Some(dy), Some(dx)) => Some(Offset { dy, dx }),
            (MergeMode::Pair, ..) => return Err("dy and dx belong to oriented mode only".to_owned()),
            (MergeMode::Oriented, ..) => return Err("oriented mode needs dy and dx".to_owned()),
        };
        Ok(Merge {
            a: self.a,
            b: self.b,
            offset,
            count: self.n,
            offset_count: self.n_offset,
            consistency: self.s,
        })
    }
}
