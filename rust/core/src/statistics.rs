//! What decides which pair is merged next: frequency, spatial consistency, priority.

use crate::grid::Offset;

/// A pair of tokens as one number; numbers are ordered as pairs are.
pub(crate) fn key(a: u32, b: u32) -> u64 {
    u64::from(a) << 32 | u64::from(b)
}

/// The pair of tokens in a [`key`].
pub(crate) fn tokens(key: u64) -> (u32, u32) {
    ((key >> 32) as u32, key as u32)
}

/// The most frequent offset of a histogram in ascending order (ties: the smaller) and its count.
pub(crate) fn most_frequent_offset(histogram: &[(Offset, u64)]) -> (Offset, u64) {
    let mut mode = (Offset { dy: 0, dx: 0 }, 0);
    for &(offset, count) in histogram {
        if count > mode.1 {
            mode = (offset, count);
        }
    }
    mode
}

/// Spatial consistency S of a histogram in ascending order: the mean Gaussian closeness of offsets to their mean.
///
/// In (0, 1] unless the kernel underflows. The order of operations is part of the specification.
pub(crate) fn consistency(histogram: &[(Offset, u64)], sigma: f64) -> f64 {
    if let [_] = histogram {
        return 1.0;
    }
    // The mean offset.
    let (mut n, mut sum_y, mut sum_x) = (0, 0.0, 0.0);
    for &(offset, count) in histogram {
        n += count;
        sum_y += count as f64 * f64::from(offset.dy);
        sum_x += count as f64 * f64::from(offset.dx);
    }
    let n = n as f64;
    let (mean_y, mean_x) = (sum_y / n, sum_x / n);
    // The mean closeness to it.
    let two_variances = 2.0 * (sigma * sigma);
    let mut sum = 0.0;
    for &(offset, count) in histogram {
        let (y, x) = (f64::from(offset.dy) - mean_y, f64::from(offset.dx) - mean_x);
        sum += count as f64 * (-(y * y + x * x) / two_variances).exp();
    }
    sum / n
}

/// Priority P = F + αS, with F relative to the most frequent candidate.
pub(crate) fn priority(count: u64, max_count: u64, alpha: f64, consistency: f64) -> f64 {
    count as f64 / max_count as f64 + alpha * consistency
}
