//! Where to cut an FFN's products for a batch whose tokens have different widths.
//!
//! A batch sorted by falling width is a staircase: a token of width `w` needs the first `w` hidden units. Two ways to
//! pave it with dense products, both exact for every choice of cuts:
//!
//! - [`Strip`]s of units: strip `lo..hi` runs on the tokens wider than `lo`, a prefix of the batch. Every weight is
//!   read once. Gate and up run in strips, and so does down where partial sums may be added up.
//! - [`RowGroup`]s of tokens: each group runs as wide as its widest token, in one product and so with one rounding.
//!   Down runs in groups where the precision is low.
//!
//! What to pave and what to merge is a question of cost alone: a shortest path over a [`CostGrid`].

use crate::{CostGrid, Error};

/// Units `lo..hi`, run by the first `tokens` of the sorted batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Strip {
    /// First unit.
    pub lo: usize,
    /// One past the last unit.
    pub hi: usize,
    /// Tokens wider than `lo`.
    pub tokens: usize,
    /// Tokens of at least `hi` units; those from here to `tokens` end inside the strip.
    pub whole: usize,
}

/// Rows `lo..hi` of the sorted batch, run `width` units wide; their widest token has that width.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowGroup {
    /// First row.
    pub lo: usize,
    /// One past the last row.
    pub hi: usize,
    /// Units, counted from 0.
    pub width: usize,
}

/// A change of cuts must be worth this share of the time, so that small noise in what was measured does not move the
/// cuts, and with them the last bits of a result.
pub const WORTH_A_CHANGE: f64 = 0.05;

/// Cuts batches by cost. Cheap to ask: a few microseconds for eight widths.
///
/// `prior` gives the cuts unless `measured` says that others are better by [`WORTH_A_CHANGE`].
#[derive(Clone, Debug)]
pub struct StripPlanner {
    prior: CostGrid,
    measured: Option<CostGrid>,
}

impl StripPlanner {
    /// A planner over one or two grids.
    #[must_use]
    pub fn new(prior: CostGrid, measured: Option<CostGrid>) -> Self {
        Self { prior, measured }
    }

    /// Seconds of a product, as measured where something was.
    #[must_use]
    pub fn seconds(&self, tokens: usize, units: usize) -> f64 {
        self.measured.as_ref().unwrap_or(&self.prior).seconds(tokens, units)
    }

    /// Strips from unit 0 up to the widest token, for `ends` of falling width: (width, row after its last token).
    ///
    /// Equal widths may come several times. Tokens of width 0 are in no strip.
    pub fn strips(&self, ends: &[(usize, usize)]) -> Result<Vec<Strip>, Error> {
        check_ends(ends)?;
        // Cuts ascending, from 0; wider[i] tokens are wider than cuts[i].
        let (mut cuts, mut wider) = (vec![0], Vec::new());
        for &(width, row) in ends.iter().rev().filter(|end| end.0 > 0) {
            if width > cuts[cuts.len() - 1] {
                cuts.push(width);
                wider.push(row);
            }
        }
        let path =
            self.cheapest(cuts.len(), |grid, from, to| grid.seconds(wider[from], cuts[to] - cuts[from]));
        Ok(path
            .windows(2)
            .map(|pair| Strip {
                lo: cuts[pair[0]],
                hi: cuts[pair[1]],
                tokens: wider[pair[0]],
                whole: wider[pair[1] - 1],
            })
            .collect())
    }

    /// Row groups of the tokens that have any width, for `ends` as in [`strips`](Self::strips).
    pub fn groups(&self, ends: &[(usize, usize)]) -> Result<Vec<RowGroup>, Error> {
        check_ends(ends)?;
        let wide: Vec<(usize, usize)> = ends.iter().copied().filter(|end| end.0 > 0).collect();
        let start = |run: usize| if run == 0 { 0 } else { wide[run - 1].1 };
        let path = self
            .cheapest(wide.len() + 1, |grid, from, to| grid.seconds(start(to) - start(from), wide[from].0));
        Ok(path
            .windows(2)
            .map(|pair| RowGroup { lo: start(pair[0]), hi: start(pair[1]), width: wide[pair[0]].0 })
            .collect())
    }

    /// The cheapest way from node 0 to the last one, by the prior unless the measured grid clearly prefers another.
    fn cheapest(&self, nodes: usize, cost: impl Fn(&CostGrid, usize, usize) -> f64) -> Vec<usize> {
        let by_prior = shortest_path(nodes, |from, to| cost(&self.prior, from, to));
        let Some(measured) = &self.measured else { return by_prior };
        let price =
            |path: &[usize]| path.windows(2).map(|pair| cost(measured, pair[0], pair[1])).sum::<f64>();
        let by_measure = shortest_path(nodes, |from, to| cost(measured, from, to));
        if price(&by_measure) < (1.0 - WORTH_A_CHANGE) * price(&by_prior) {
            by_measure
        } else {
            by_prior
        }
    }
}

/// Nodes of the cheapest path `0 -> nodes - 1` that only goes up; of equal ones the path with the earlier last step.
fn shortest_path(nodes: usize, cost: impl Fn(usize, usize) -> f64) -> Vec<usize> {
    let mut best = vec![f64::INFINITY; nodes];
    let mut previous = vec![0; nodes];
    best[0] = 0.0;
    for to in 1..nodes {
        for from in 0..to {
            let total = best[from] + cost(from, to);
            if total < best[to] {
                best[to] = total;
                previous[to] = from;
            }
        }
    }
    let mut path = vec![nodes - 1];
    while path[path.len() - 1] > 0 {
        path.push(previous[path[path.len() - 1]]);
    }
    path.reverse();
    path
}

fn check_ends(ends: &[(usize, usize)]) -> Result<(), Error> {
    let sorted = ends.windows(2).all(|pair| pair[0].0 >= pair[1].0 && pair[0].1 <= pair[1].1);
    if sorted {
        return Ok(());
    }
    Err(Error::out_of_range("ends", "of falling width and rising row", ends.len() as f64))
}
