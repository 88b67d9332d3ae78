//! A learned vocabulary: the rules in order, how they were learned, and the file that keeps them.

use rustc_hash::FxHashSet;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::grid::{MAX_SIDE, MAX_VOCAB_SIZE, Offset};

const FORMAT: &str = "being-vl/visual-bpe";
const VERSION: u32 = 1;

/// What a rule matches.
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

/// One rule `(a, b) → new token`, with the pair's statistics at the time it was chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rule {
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

/// The rules of a visual BPE and how they were learned. Whoever holds one knows that its rules are sound.
#[derive(Debug, Clone, PartialEq)]
pub struct Vocabulary {
    pub(crate) base_vocab_size: u32,
    pub(crate) merge_mode: MergeMode,
    pub(crate) alpha: f64,
    pub(crate) sigma: f64,
    pub(crate) min_frequency: u64,
    pub(crate) quantizer: Quantizer,
    pub(crate) grid_sizes: Vec<GridSize>,
    pub(crate) rules: Vec<Rule>,
}

impl Vocabulary {
    /// Number of ids in the codebook (K).
    #[must_use]
    pub fn base_vocab_size(&self) -> u32 {
        self.base_vocab_size
    }

    /// Number of tokens: codebook ids and one per rule.
    #[must_use]
    pub fn vocab_size(&self) -> u32 {
        self.base_vocab_size + self.rules.len() as u32
    }

    /// What the rules match.
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

    /// The rules in the order learned; rule `i` makes token `base_vocab_size + i`.
    #[must_use]
    pub fn rules(&self) -> &[Rule] {
        &self.rules
    }

    /// The rule that made a token, or `None` for an id of the codebook.
    pub(crate) fn rule_of(&self, token: u32) -> Option<&Rule> {
        self.rules.get(token.checked_sub(self.base_vocab_size)? as usize)
    }

    /// Number of cells that each rule's token covers, at most `u64::MAX`.
    pub(crate) fn merged_sizes(&self) -> Vec<u64> {
        let mut sizes: Vec<u64> = Vec::with_capacity(self.rules.len());
        for rule in &self.rules {
            let size = |token: u32| token.checked_sub(self.base_vocab_size).map_or(1, |i| sizes[i as usize]);
            sizes.push(size(rule.a).saturating_add(size(rule.b)));
        }
        sizes
    }

    /// The vocabulary file's content: JSON with one rule per line.
    ///
    /// # Errors
    /// None that could happen; numbers and strings always have a JSON form.
    pub fn to_json(&self) -> Result<String> {
        let mut text = self.content()?;
        let checksum = checksum(&text);
        text.extend([",\n  \"checksum\": \"", &checksum, "\"\n}\n"]);
        Ok(text)
    }

    /// The file up to its checksum.
    fn content(&self) -> Result<String> {
        let format = |error: serde_json::Error| Error::Format(error.to_string());
        let head = Head {
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
            num_merges: self.rules.len() as u64,
            merges: Vec::new(),
            checksum: None,
        };
        let mut text = serde_json::to_string_pretty(&head).map_err(format)?;
        // The head ends with an empty list of merges.
        text.truncate(text.len() - "]\n}".len());
        for (index, rule) in self.rules.iter().enumerate() {
            text.push_str(if index == 0 { "\n    " } else { ",\n    " });
            text.push_str(&serde_json::to_string(&Merge::from(rule)).map_err(format)?);
        }
        text.push_str(if self.rules.is_empty() { "]" } else { "\n  ]" });
        Ok(text)
    }

    /// Reads the content of a vocabulary file and checks all of it.
    ///
    /// # Errors
    /// [`Error::Format`], [`Error::Option`], [`Error::VocabularySize`] or [`Error::Rule`], saying where.
    pub fn from_json(text: &str) -> Result<Self> {
        let format = |error: serde_json::Error| Error::Format(error.to_string());
        let Marks { format: found, version } = serde_json::from_str(text).map_err(format)?;
        if found != FORMAT {
            return Err(Error::Format(format!("its format is {found:?}, expected {FORMAT:?}")));
        }
        if version != VERSION {
            return Err(Error::Format(format!("its version is {version}, this program reads {VERSION}")));
        }
        let head: Head = serde_json::from_str(text).map_err(format)?;
        if head.num_merges != head.merges.len() as u64 {
            let (promised, found) = (head.num_merges, head.merges.len());
            return Err(Error::Format(format!("num_merges is {promised}, but there are {found} merges")));
        }
        check_grid_sizes(&head)?;
        let rules = head
            .merges
            .iter()
            .enumerate()
            .map(|(rule, merge)| merge.rule(head.merge_mode).map_err(|problem| Error::Rule { rule, problem }))
            .collect::<Result<_>>()?;
        let vocabulary = Self {
            base_vocab_size: head.base_vocab_size,
            merge_mode: head.merge_mode,
            alpha: head.alpha,
            sigma: head.sigma,
            min_frequency: head.min_frequency,
            quantizer: head.quantizer,
            grid_sizes: head.grid_sizes,
            rules,
        }
        .checked()?;
        // Files without one are from before there were any, or were edited on purpose.
        if let Some(promised) = head.checksum {
            let found = checksum(&vocabulary.content()?);
            if promised != found {
                return Err(Error::Format(format!(
                    "it was altered: its checksum is {promised:?}, but its content has {found:?}"
                )));
            }
        }
        Ok(vocabulary)
    }

    /// Makes sure that the options are legal and every rule is sound.
    fn checked(self) -> Result<Self> {
        check_options(self.base_vocab_size, self.rules.len(), self.alpha, self.sigma, self.min_frequency)?;
        let mut seen = FxHashSet::default();
        for (i, rule) in self.rules.iter().enumerate() {
            let tokens = self.base_vocab_size + i as u32;
            let problem = if rule.a >= tokens || rule.b >= tokens {
                let (name, token) = if rule.a >= tokens { ("a", rule.a) } else { ("b", rule.b) };
                Some(format!("{name} = {token} is not an earlier token, expected 0 to {}", tokens - 1))
            } else if !seen.insert((rule.a, rule.b, rule.offset)) {
                Some("the same merge stands earlier in the list".to_owned())
            } else {
                rule.problem()
            };
            if let Some(problem) = problem {
                return Err(Error::Rule { rule: i, problem });
            }
        }
        Ok(self)
    }
}

impl Rule {
    /// What is wrong with the rule's own numbers, if anything is.
    fn problem(&self) -> Option<String> {
        if let Some(Offset { dy, dx }) = self.offset {
            let side = MAX_SIDE as i32;
            let later = dy > 0 || dy == 0 && dx > 0;
            if !later || dy >= side || dx >= side || dx <= -side {
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
    let illegal = |name, value, expected| Err(Error::Option { name, value, expected });
    if base_vocab_size == 0 {
        return illegal("base_vocab_size", "0".to_owned(), "at least 1");
    }
    if base_vocab_size as usize + num_merges > MAX_VOCAB_SIZE as usize {
        return Err(Error::VocabularySize { base_vocab_size, num_merges });
    }
    if !(alpha.is_finite() && alpha >= 0.0) {
        return illegal("alpha", alpha.to_string(), "a finite number of at least 0");
    }
    let two_variances = 2.0 * (sigma * sigma);
    if !(sigma > 0.0 && two_variances.is_normal()) {
        return illegal("sigma", sigma.to_string(), "a positive number of ordinary size");
    }
    if min_frequency == 0 {
        return illegal("min_frequency", "0".to_owned(), "at least 1");
    }
    Ok(())
}

/// FNV-1a, 64 bits: made for accidents, so that a digit that has changed does not pass for what was learned.
fn checksum(text: &str) -> String {
    let hash = text.bytes().fold(0xCBF2_9CE4_8422_2325, |hash: u64, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01B3)
    });
    format!("{hash:016x}")
}

fn check_grid_sizes(head: &Head) -> Result<()> {
    let side = MAX_SIDE as u32;
    let mut total = 0_u64;
    for (i, size) in head.grid_sizes.iter().enumerate() {
        let GridSize { height, width, grids } = *size;
        let sides = 1..=side;
        if !sides.contains(&height) || !sides.contains(&width) || grids == 0 {
            let problem = format!("grid_sizes[{i}]: {grids} grids of {height}x{width} cannot be");
            return Err(Error::Format(problem));
        }
        total = total.saturating_add(grids);
    }
    if total != head.num_grids {
        let promised = head.num_grids;
        return Err(Error::Format(format!("num_grids is {promised}, but grid_sizes add up to {total}")));
    }
    Ok(())
}

/// The two fields that every version has.
#[derive(Deserialize)]
struct Marks {
    format: String,
    version: u32,
}

/// The file as it is written.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Head {
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
    // Last of what is written by serde, because `to_json` writes the lines itself, and the checksum after them.
    merges: Vec<Merge>,
    #[serde(default, skip_serializing)]
    checksum: Option<String>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Merge {
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

impl From<&Rule> for Merge {
    fn from(rule: &Rule) -> Self {
        Self {
            a: rule.a,
            b: rule.b,
            dy: rule.offset.map(|offset| offset.dy),
            dx: rule.offset.map(|offset| offset.dx),
            n: rule.count,
            n_offset: rule.offset_count,
            s: rule.consistency,
        }
    }
}

impl Merge {
    fn rule(&self, mode: MergeMode) -> std::result::Result<Rule, String> {
        let offset = match (mode, self.dy, self.dx) {
            (MergeMode::Pair, None, None) => None,
            (MergeMode::Oriented, Some(dy), Some(dx)) => Some(Offset { dy, dx }),
            (MergeMode::Pair, ..) => return Err("dy and dx belong to oriented mode only".to_owned()),
            (MergeMode::Oriented, ..) => return Err("oriented mode needs dy and dx".to_owned()),
        };
        Ok(Rule {
            a: self.a,
            b: self.b,
            offset,
            count: self.n,
            offset_count: self.n_offset,
            consistency: self.s,
        })
    }
}
