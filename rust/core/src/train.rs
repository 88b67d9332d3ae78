//! Training, for now the plain way: every rule after a full count.

use std::collections::BTreeMap;

use crate::error::Result;
use crate::grid::{Grid, Offset};
use crate::interrupt::Interrupt;
use crate::region::Canvas;
use crate::statistics::{consistency, key, most_frequent, priority, tokens};
use crate::vocabulary::{GridSize, MergeMode, Quantizer, Rule, Vocabulary, check_options};

/// How to learn a vocabulary.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainOptions {
    /// Number of ids in the codebook (K).
    pub base_vocab_size: u32,
    /// Most rules to learn.
    pub num_merges: usize,
    /// What a rule matches.
    pub merge_mode: MergeMode,
    /// Weight of spatial consistency in the priority.
    pub alpha: f64,
    /// Width of the kernel of spatial consistency, in cells.
    pub sigma: f64,
    /// Least frequency of a pair that is merged.
    pub min_frequency: u64,
    /// Number of threads; 0 means one per core. The result does not depend on it.
    pub num_threads: usize,
    /// The quantizer whose ids these are.
    pub quantizer: Quantizer,
}

/// How far training has come.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Progress {
    /// Rules learned.
    pub merges: usize,
    /// Most rules to learn.
    pub num_merges: usize,
    /// The rule learned last.
    pub rule: Rule,
}

/// Learns a vocabulary from grids. `progress` is called after every rule.
///
/// # Errors
/// Grids or options that cannot be used, [`Error::Interrupted`](crate::Error::Interrupted) if asked to stop.
pub fn train(
    grids: &[Grid],
    options: &TrainOptions,
    mut progress: impl FnMut(Progress),
    interrupt: &Interrupt,
) -> Result<Vocabulary> {
    let &TrainOptions { base_vocab_size, num_merges, merge_mode, alpha, sigma, min_frequency, .. } = options;
    check_options(base_vocab_size, num_merges, alpha, sigma, min_frequency)?;
    let mut canvas = Canvas::default();
    for (index, grid) in grids.iter().enumerate() {
        grid.check_ids(index, base_vocab_size)?;
        canvas.push(grid);
    }
    let mut rules = Vec::new();
    while rules.len() < num_merges {
        interrupt.check()?;
        let mut pairs: BTreeMap<u64, BTreeMap<Offset, u64>> = BTreeMap::new();
        let mut found = Vec::new();
        let mut all = Vec::new();
        for x in canvas.anchors() {
            found.clear();
            canvas.neighbours(x, &mut found);
            for &y in found.iter().filter(|&&y| y > x) {
                let pair = key(canvas.token(x), canvas.token(y));
                *pairs.entry(pair).or_default().entry(canvas.offset(x, y)).or_default() += 1;
                all.push((pair, x, y));
            }
        }
        let mut candidates = Vec::new();
        for (pair, histogram) in pairs {
            let histogram: Vec<_> = histogram.into_iter().collect();
            let n: u64 = histogram.iter().map(|(_, n)| n).sum();
            let (offset, n_offset) = most_frequent(&histogram);
            let f = if merge_mode == MergeMode::Pair { n } else { n_offset };
            if f >= min_frequency {
                candidates.push((pair, n, offset, n_offset, f, consistency(&histogram, sigma)));
            }
        }
        let Some(max) = candidates.iter().map(|c| c.4).max() else { break };
        let mut best = candidates[0];
        for &c in &candidates {
            if priority(c.4, max, alpha, c.5) > priority(best.4, max, alpha, best.5) {
                best = c;
            }
        }
        let (a, b) = tokens(best.0);
        let token = base_vocab_size + rules.len() as u32;
        let offset = (merge_mode == MergeMode::Oriented).then_some(best.2);
        for (pair, x, y) in all {
            if pair == best.0
                && canvas.token_at(x) == Some(a)
                && canvas.token_at(y) == Some(b)
                && offset.is_none_or(|offset| canvas.offset(x, y) == offset)
            {
                canvas.merge(x, y, token, |_| ());
            }
        }
        let rule = Rule { a, b, offset, count: best.1, offset_count: best.3, consistency: best.5 };
        rules.push(rule);
        progress(Progress { merges: rules.len(), num_merges, rule });
    }
    let mut sizes = BTreeMap::new();
    for grid in grids {
        *sizes.entry((grid.height(), grid.width())).or_default() += 1;
    }
    let grid_sizes =
        sizes.into_iter().map(|((height, width), grids)| GridSize { height, width, grids }).collect();
    let quantizer = options.quantizer.clone();
    Ok(Vocabulary { base_vocab_size, merge_mode, alpha, sigma, min_frequency, quantizer, grid_sizes, rules })
}
