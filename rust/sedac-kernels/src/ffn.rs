//! A whole FFN for one to four rows, of which each uses its own units.
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
    columns::{AddUnits, SumParts},
    element::Element,
    hidden::Hide,
    linear::Rows,
    matrix::Matrix,
    products::{Inputs, STEP},
    rows::{split_outputs, tasks_of, widened, Parts},
    runs::{Runs, RUNS},
    shadow::{Choose, Int8Row, Shadow},
    site::{Down, Ffn, Need, Point},
    team::Team,
    Error, MAX_ROWS,
};

/// Blocks that the units are cut into: enough to share out, few enough that summing their outputs costs little.
const BLOCKS: usize = 32;
/// Numbers in the parts from which their sum is shared out over the team.
const SHARED_SUM_FROM: usize = 1 << 16;

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
    let call = Call { isa, team, weights, shadow, points, x };
    match rows {
        1 => Ok(call.run::<1>(y, hidden)),
        2 => Ok(call.run::<2>(y, hidden)),
        3 => Ok(call.run::<3>(y, hidden)),
        MAX_ROWS => Ok(call.run::<MAX_ROWS>(y, hidden)),
        got => Err(Error::Rows { got }),
    }
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

struct Call<'a, T> {
    isa: Isa,
    team: &'a dyn Team,
    weights: &'a Ffn<'a, T>,
    shadow: Option<Shadow<'a>>,
    points: &'a [Point],
    x: &'a [T],
}

impl<T: Element> Call<'_, T> {
    fn run<const N: usize>(&self, y: &mut [T], hidden: Option<&mut [f32]>) -> Used {
        let mut space = WORKSPACE.take();
        let widest = self.points.iter().map(|point| point.width.min(self.weights.units())).max().unwrap_or(0);
        let block =
            self.weights.units().div_ceil(BLOCKS).next_multiple_of(RUNS * LANE_UNITS).max(RUNS * LANE_UNITS);
        let blocks = widest.div_ceil(block);
        space.chosen.resize_with(space.chosen.len().max(blocks), Vec::new);
        let wide = widened(self.isa, self.x);
        self.choose(&mut space.chosen[..blocks], &wide, block, widest);
        let inputs = Inputs::<T, N>::new(self.x, &wide);
        let chosen = &space.chosen[..blocks];
        match self.weights.down {
            Down::Columns(down) => self.by_columns(down, inputs, chosen, block, &mut space.parts, y, hidden),
            Down::Rows(down) => {
                let hidden = hidden.unwrap_or_else(|| {
                    space.hidden.resize(space.hidden.len().max(N * self.weights.units()), 0.0);
                    &mut space.hidden[..N * self.weights.units()]
                });
                self.by_rows(down, inputs, chosen, block, widest, hidden, y);
            }
        }
        let read = chosen.iter().map(Vec::len).sum();
        let needed = match N {
            1 => read,
            _ => chosen.iter().flatten().map(|(_, rows)| rows.count_ones() as usize).sum(),
        };
        WORKSPACE.set(space);
        Used { needed, read }
    }

    /// Fills one list per block; `wide` are the inputs.
    fn choose(&self, chosen: &mut [Vec<Need>], wide: &[f32], block: usize, widest: usize) {
        let runs_of =
            |b: usize| Runs { from: b * block, length: block / RUNS, to: ((b + 1) * block).min(widest) };
        let Some(shadow) = self.shadow.filter(|_| self.points.iter().any(|point| point.importance_min > 0.0))
        else {
            for (b, chosen) in chosen.iter_mut().enumerate() {
                chosen.clear();
                let runs = runs_of(b);
                for at in 0..runs.length {
                    for unit in (0..RUNS).map(|r| runs.unit(at, r)).take_while(|&unit| unit < runs.to) {
                        // This runs on one thread while the others wait.
                        let rows = match self.points {
                            [_] => 1,
                            points => (0..points.len()).map(|n| u8::from(points[n].width > unit) << n).sum(),
                        };
                        chosen.push((unit as u32, rows));
                    }
                }
            }
            return;
        };
        let rows: Vec<_> = wide.chunks_exact(self.weights.hidden_size()).map(Int8Row::of).collect();
        let lists: Vec<_> = chosen.iter_mut().map(Mutex::new).collect();
        self.team.run(lists.len(), &|b| {
            let mut chosen = lists[b].lock().expect("each task is run once");
            self.isa.run(Choose {
                shadow,
                activation: self.weights.activation,
                rows: &rows,
                points: self.points,
                runs: runs_of(b),
                chosen: &mut chosen,
            });
        });
    }

    #[allow(clippy::too_many_arguments)] // parts of one call
    fn by_columns<const N: usize>(
        &self,
        down: Matrix<'_, T>,
        inputs: Inputs<'_, T, N>,
        chosen: &[Vec<Need>],
        block: usize,
        parts: &mut Vec<f32>,
        y: &mut [T],
        hidden: Option<&mut [f32]>,
    ) {
        let d = self.weights.hidden_size();
        let mut hidden: Option<Parts<'_, f32, N>> = hidden.map(|hidden| {
            hidden.fill(0.0);
            split_outputs(hidden, block)
        });
        parts.resize(parts.len().max(chosen.len() * N * d), 0.0);
        let parts = &mut parts[..chosen.len() * N * d];
        let sums: Vec<_> = parts.chunks_exact_mut(N * d).map(Mutex::new).collect();
        self.team.run(chosen.len(), &|b| {
            let mut sums = sums[b].lock().expect("each task is run once");
            sums.fill(0.0);
            let mut sums = sums.chunks_exact_mut(d);
            let mut hidden = hidden.as_ref().map(|parts| parts[b].lock().expect("each task is run once"));
            self.isa.run(AddUnits {
                weights: self.weights,
                down,
                inputs,
                units: &chosen[b],
                // A guess at what this thread does next, to have it brought near.
                next: chosen.get(b + self.team.threads()).map_or(&[], Vec::as_slice),
                sums: std::array::from_fn(|_| sums.next().unwrap_or_default()),
                first: b * block,
                hidden: hidden.as_deref_mut(),
            });
        });
        drop(sums);
        hidden.take();
        let team = (parts.len() >= SHARED_SUM_FROM).then_some(self.team);
        let width = team.map_or(d, |team| d.div_ceil(team.threads()).next_multiple_of(LANE_UNITS)).max(1);
        let outputs = split_outputs::<T, N>(y, width);
        let sum = |i: usize| {
            let mut outputs = outputs[i].lock().expect("each task is run once");
            let bias = self.weights.down_bias;
            self.isa.run(SumParts { parts, bias, length: d, from: i * width, outputs: &mut outputs });
        };
        match team {
            Some(team) => team.run(outputs.len(), &sum),
            None => (0..outputs.len()).for_each(sum),
        }
    }

    #[allow(clippy::too_many_arguments)] // parts of one call
    fn by_rows<const N: usize>(
        &self,
        down: Matrix<'_, T>,
        inputs: Inputs<'_, T, N>,
        chosen: &[Vec<Need>],
        block: usize,
        widest: usize,
        hidden: &mut [f32],
        y: &mut [T],
    ) {
        hidden.fill(0.0);
        let parts = split_outputs::<f32, N>(hidden, block);
        self.team.run(chosen.len(), &|b| {
            let mut hidden = parts[b].lock().expect("each task is run once");
            self.isa.run(Hide {
                weights: self.weights,
                inputs,
                units: &chosen[b],
                next: chosen.get(b + self.team.threads()).map_or(&[], Vec::as_slice),
                first: b * block,
                hidden: &mut hidden,
            });
        });
        drop(parts);
        let f = self.weights.units();
        // Up to where a row's bits do not depend on how far the others reach.
        let length = widest.next_multiple_of(STEP).min(f);
        let wide = std::array::from_fn(|n| &hidden[n * f..][..length]);
        let inputs = Inputs { own: [&[] as &[T]; N], wide };
        let per_task = tasks_of(self.weights.hidden_size(), self.team);
        let outputs = split_outputs::<T, N>(y, per_task);
        self.team.run(outputs.len(), &|task| {
            let mut outputs = outputs[task].lock().expect("each task is run once");
            let bias = self.weights.down_bias;
            self.isa.run(Rows { weight: down, bias, inputs, from: task * per_task, outputs: &mut outputs });
        });
    }
}
