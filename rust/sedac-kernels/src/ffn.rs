//! A whole FFN for a few rows, of which each uses its own units.
//!
//! Three steps, each shared out over the team: which units each row needs ([`crate::shadow`]); the hidden values of
//! those units, from gate's and up's rows, and what they add to the output; the sum of the parts. Units are taken in
//! fixed blocks, those of a block in a fixed order ([`crate::runs`]), and blocks are summed in order, so that the bits
//! of a row depend neither on the number of threads nor on the other rows. A unit that several rows need is read once.
//!
//! Where a unit's column of down is contiguous, only the columns of units in use are read. Where down is laid out as
//! `nn.Linear` keeps it, hidden values are gathered first and down is read up to the widest row's width.
//!
//! Weights are taken to be finite: a unit that one row needs has the factor 0 for the others.

use std::{cell::Cell, sync::Mutex};

use crate::{
    arch::{Isa, LANE_UNITS},
    element::Element,
    groups::{rows_of_group, widest, Group},
    rows::widened,
    runs::{Runs, RUNS},
    shadow::{Choose, Int8Row, Shadow},
    site::{Down, Ffn, Need, Point},
    steps::Call,
    team::Team,
    Error, MAX_ROWS,
};

/// Blocks that the units are cut into: enough to share out, few enough that summing their outputs costs little.
const BLOCKS: usize = 32;

/// What a call used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// Units, summed over the rows.
    pub needed: usize,
    /// Units that some row needed.
    pub read: usize,
}

/// Runs the FFN on `points.len()` rows: x and y `[rows][hidden size]`.
///
/// `hidden`, where given, is `[rows][units]` and receives the hidden value of each unit in use, 0 for the others (what
/// a compensation of the units left out is computed from).
///
/// # Errors
///
/// [`Error::Size`] where something does not fit or there are no inputs, [`Error::Rows`] for more than [`MAX_ROWS`] rows
/// or none, [`Error::NoShadow`] for an importance without a shadow.
#[allow(clippy::too_many_arguments)] // one argument per thing that a call is about
pub fn ffn<T: Element>(
    isa: Isa,
    team: &dyn Team,
    weights: &Ffn<'_, T>,
    shadow: Option<Shadow<'_>>,
    points: &[Point],
    x: &[T],
    y: &mut [T],
    hidden: Option<&mut [f32]>,
) -> Result<Used, Error> {
    weights.check()?;
    let (rows, f, d) = (points.len(), weights.units(), weights.hidden_size());
    let given = hidden.as_ref().map_or(rows * f, |hidden| hidden.len());
    for (what, got, wanted) in
        [("x", x.len(), rows * d), ("y", y.len(), rows * d), ("hidden", given, rows * f)]
    {
        if got != wanted {
            return Err(Error::size(what, wanted, got));
        }
    }
    if let Some(shadow) = shadow {
        let got = (shadow.units(), shadow.hidden_size());
        if got != (f, d) {
            let size = |(units, inputs)| format!("{units} units of {inputs} inputs");
            return Err(Error::size("shadow", size((f, d)), size(got)));
        }
    } else if points.iter().any(|point| point.importance_min > 0.0) {
        return Err(Error::NoShadow);
    }
    if !(1..=MAX_ROWS).contains(&rows) {
        return Err(Error::Rows { got: rows });
    }
    Ok(Call { isa, team, weights, shadow, block: block_of(f) }.run(points, x, y, hidden))
}

/// Units in one block of an FFN.
fn block_of(units: usize) -> usize {
    units.div_ceil(BLOCKS).next_multiple_of(RUNS * LANE_UNITS).max(RUNS * LANE_UNITS)
}

/// Memory that a thread keeps from call to call: fresh pages would cost more than the sums in them.
#[derive(Default)]
struct Workspace {
    chosen: Vec<Vec<Need>>,
    parts: Vec<f32>,
    hidden: Vec<f32>,
}

thread_local! {
    static WORKSPACE: Cell<Workspace> = const {
        Cell::new(Workspace { chosen: Vec::new(), parts: Vec::new(), hidden: Vec::new() })
    };
}

impl<T: Element> Call<'_, T> {
    fn run(&self, points: &[Point], x: &[T], y: &mut [T], hidden: Option<&mut [f32]>) -> Used {
        let (f, d) = (self.weights.units(), self.weights.hidden_size());
        let mut space = WORKSPACE.take();
        let points: Vec<_> =
            points.iter().map(|point| Point { width: point.width.min(f), ..*point }).collect();
        let widest = widest(&points);
        let blocks = widest.div_ceil(self.block);
        let of_group = rows_of_group(points.len());
        let count = points.len().div_ceil(of_group);
        space.chosen.resize_with(space.chosen.len().max(count * blocks), Vec::new);
        let wide = widened(self.isa, x);
        let rows = points.chunks(of_group).zip(wide.chunks(of_group * d));
        let chosen = &mut space.chosen[..count * blocks];
        self.choose(chosen, blocks, rows.clone());
        let chosen = &space.chosen[..count * blocks];
        let units_of = |g: usize| &chosen[g * blocks..(g + 1) * blocks];
        let groups: Vec<_> = rows
            .zip(x.chunks(of_group * d))
            .enumerate()
            .map(|(g, ((points, wide), x))| Group { points, x, wide, chosen: units_of(g) })
            .collect();
        match self.weights.down {
            Down::Columns(down) => self.by_columns(down, &groups, &mut space.parts, y, hidden),
            Down::Rows(down) => {
                let hidden = hidden.unwrap_or_else(|| {
                    space.hidden.resize(space.hidden.len().max(points.len() * f), 0.0);
                    &mut space.hidden[..points.len() * f]
                });
                self.by_rows(down, &groups, hidden, y);
            }
        }
        let used = self.used(&groups);
        WORKSPACE.set(space);
        used
    }

    fn used(&self, groups: &[Group<'_, T>]) -> Used {
        let needs = |group: &Group<'_, T>| -> usize {
            group.chosen.iter().flatten().map(|(_, rows)| rows.count_ones() as usize).sum()
        };
        let read = if let [group] = groups {
            group.chosen.iter().map(Vec::len).sum()
        } else {
            let mut seen = vec![false; self.weights.units()];
            for (unit, _) in groups.iter().flat_map(|group| group.chosen).flatten() {
                seen[*unit as usize] = true;
            }
            seen.into_iter().filter(|&seen| seen).count()
        };
        let one_row = matches!(groups, [group] if group.points.len() == 1);
        Used { needed: if one_row { read } else { groups.iter().map(needs).sum() }, read }
    }

    /// Fills one list per group and block; `rows` are each group's points and inputs.
    fn choose<'b>(
        &self,
        chosen: &mut [Vec<Need>],
        blocks: usize,
        rows: impl Iterator<Item = (&'b [Point], &'b [f32])>,
    ) {
        let runs_of = |b: usize, widest: usize| Runs {
            from: b * self.block,
            length: self.block / RUNS,
            to: ((b + 1) * self.block).min(widest),
        };
        let mut choosers = Vec::new();
        for ((points, wide), chosen) in rows.zip(chosen.chunks_mut(blocks.max(1))) {
            let widest = widest(points);
            match self.shadow.filter(|_| points.iter().any(|point| point.importance_min > 0.0)) {
                Some(shadow) => {
                    let rows: Vec<_> =
                        wide.chunks_exact(self.weights.hidden_size()).map(Int8Row::of).collect();
                    let lists: Vec<_> = chosen.iter_mut().map(Mutex::new).collect();
                    choosers.push(move |b: usize| {
                        let mut chosen = lists[b].lock().expect("each task is run once");
                        self.isa.run(Choose {
                            shadow,
                            activation: self.weights.activation,
                            rows: &rows,
                            points,
                            runs: runs_of(b, widest),
                            chosen: &mut chosen,
                        });
                    });
                }
                None => {
                    for (b, chosen) in chosen.iter_mut().enumerate() {
                        all_of(runs_of(b, widest), points, chosen);
                    }
                }
            }
        }
        if !choosers.is_empty() {
            self.team.run(blocks, &|b| choosers.iter().for_each(|choose| choose(b)));
        }
    }
}

/// The units of a block that lie within the rows' widths, where nothing else decides.
fn all_of(runs: Runs, points: &[Point], chosen: &mut Vec<Need>) {
    chosen.clear();
    for at in 0..runs.length {
        for unit in (0..RUNS).map(|r| runs.unit(at, r)).take_while(|&unit| unit < runs.to) {
            // This runs on one thread while the others wait.
            let rows = match points {
                [_] => 1,
                points => (0..points.len()).map(|n| u8::from(points[n].width > unit) << n).sum(),
            };
            chosen.push((unit as u32, rows));
        }
    }
}
