//! The two ways from the units in use to the output, by how down's weights lie.

use std::sync::Mutex;

use crate::{
    arch::{Isa, LANE_UNITS},
    columns::{AddUnits, SumParts},
    element::Element,
    groups::{piece_of, split, widest, with_rows, Group},
    hidden::Hide,
    linear::Rows,
    matrix::Matrix,
    products::{Inputs, STEP},
    rows::{split_outputs, tasks_of},
    shadow::Shadow,
    site::Ffn,
    team::Team,
};

/// Numbers in the parts from which their sum is shared out over the team.
const SHARED_SUM_FROM: usize = 1 << 16;

/// What one group does in a task.
type Step<'a> = Box<dyn Fn(usize) + Sync + 'a>;
/// What one group does with some of a block's units: the block, and from which to which of those that it needs.
type BlockStep<'a> = Box<dyn Fn(usize, usize, usize) + Sync + 'a>;

/// What all groups of rows share.
pub(crate) struct Call<'a, T> {
    pub(crate) isa: Isa,
    pub(crate) team: &'a dyn Team,
    pub(crate) weights: &'a Ffn<'a, T>,
    pub(crate) shadow: Option<Shadow<'a>>,
    pub(crate) block: usize,
}

impl<T: Element> Call<'_, T> {
    /// Columns of down, each times its unit's hidden value: parts of the sum by block, then their sum.
    pub(crate) fn by_columns(
        &self,
        down: Matrix<'_, T>,
        groups: &[Group<'_, T>],
        parts: &mut Vec<f32>,
        y: &mut [T],
        hidden: Option<&mut [f32]>,
    ) {
        let d = self.weights.hidden_size();
        let blocks = groups[0].chosen.len();
        let rows: usize = groups.iter().map(|group| group.points.len()).sum();
        parts.resize(parts.len().max(rows * blocks * d), 0.0);
        let parts = &mut parts[..rows * blocks * d];
        let mut hidden = hidden.map(|hidden| split(hidden, self.weights.units(), rows));
        let steps: Vec<_> = groups
            .iter()
            .zip(split(parts, blocks * d, rows))
            .map(|(&group, parts)| {
                let hidden = hidden.as_mut().map(|hidden| hidden.next().unwrap_or_default());
                with_rows!(group.points.len(), self.adds(group, down, parts, hidden))
            })
            .collect();
        self.in_turns(groups, &steps, if self.weights.gate.is_some() { 3 } else { 2 });
        drop(steps);
        let team = (parts.len() >= SHARED_SUM_FROM).then_some(self.team);
        let width = team.map_or(d, |team| d.div_ceil(team.threads()).next_multiple_of(LANE_UNITS)).max(1);
        let steps: Vec<_> = groups
            .iter()
            .zip(split(parts, blocks * d, rows))
            .zip(split(y, d, rows))
            .map(|((group, parts), y)| with_rows!(group.points.len(), self.sums(parts, width, y)))
            .collect();
        let sum = |i: usize| steps.iter().for_each(|step| step(i));
        match team {
            Some(team) => team.run(d.div_ceil(width), &sum),
            None => (0..d.div_ceil(width)).for_each(sum),
        }
    }

    fn adds<'a, const N: usize>(
        &'a self,
        group: Group<'a, T>,
        down: Matrix<'a, T>,
        parts: &'a mut [f32],
        hidden: Option<&'a mut [f32]>,
    ) -> BlockStep<'a> {
        let d = self.weights.hidden_size();
        let hidden = hidden.map(|hidden| {
            hidden.fill(0.0);
            split_outputs::<f32, N>(hidden, self.block)
        });
        let sums: Vec<_> = parts.chunks_exact_mut(N * d).map(Mutex::new).collect();
        Box::new(move |b, from, to| {
            let mut sums = sums[b].lock().expect("each task is run once");
            if from == 0 {
                sums.fill(0.0);
            }
            let mut sums = sums.chunks_exact_mut(d);
            let mut hidden = hidden.as_ref().map(|parts| parts[b].lock().expect("each task is run once"));
            let [units, next] = group.some(b, from, to, self.team.threads());
            self.isa.run(AddUnits {
                weights: self.weights,
                down,
                inputs: group.inputs::<N>(),
                units,
                next,
                sums: std::array::from_fn(|_| sums.next().unwrap_or_default()),
                first: b * self.block,
                hidden: hidden.as_deref_mut(),
            });
        })
    }

    fn sums<'a, const N: usize>(&'a self, parts: &'a [f32], width: usize, y: &'a mut [T]) -> Step<'a> {
        let outputs = split_outputs::<T, N>(y, width);
        Box::new(move |i| {
            let mut outputs = outputs[i].lock().expect("each task is run once");
            let (bias, length) = (self.weights.down_bias, self.weights.hidden_size());
            self.isa.run(SumParts { parts, bias, length, from: i * width, outputs: &mut outputs });
        })
    }

    /// Hidden values first, then down's rows against them, up to the widest row of a group.
    pub(crate) fn by_rows(
        &self,
        down: Matrix<'_, T>,
        groups: &[Group<'_, T>],
        hidden: &mut [f32],
        y: &mut [T],
    ) {
        let (f, d) = (self.weights.units(), self.weights.hidden_size());
        let rows: usize = groups.iter().map(|group| group.points.len()).sum();
        hidden.fill(0.0);
        let steps: Vec<_> = groups
            .iter()
            .zip(split(hidden, f, rows))
            .map(|(&group, hidden)| with_rows!(group.points.len(), self.hides(group, hidden)))
            .collect();
        self.in_turns(groups, &steps, if self.weights.gate.is_some() { 2 } else { 1 });
        drop(steps);
        let per_task = tasks_of(d, self.team, groups.len(), f * size_of::<T>());
        let steps: Vec<_> = groups
            .iter()
            .zip(split(hidden, f, rows))
            .zip(split(y, d, rows))
            .map(|((&group, hidden), y)| {
                with_rows!(group.points.len(), self.projects(group, down, hidden, per_task, y))
            })
            .collect();
        self.team.run(d.div_ceil(per_task), &|task| steps.iter().for_each(|step| step(task)));
    }

    fn hides<'a, const N: usize>(&'a self, group: Group<'a, T>, hidden: &'a mut [f32]) -> BlockStep<'a> {
        let parts = split_outputs::<f32, N>(hidden, self.block);
        Box::new(move |b, from, to| {
            let mut hidden = parts[b].lock().expect("each task is run once");
            let [units, next] = group.some(b, from, to, self.team.threads());
            self.isa.run(Hide {
                weights: self.weights,
                inputs: group.inputs::<N>(),
                units,
                next,
                first: b * self.block,
                hidden: &mut hidden,
            });
        })
    }

    fn projects<'a, const N: usize>(
        &'a self,
        group: Group<'a, T>,
        down: Matrix<'a, T>,
        hidden: &'a [f32],
        per_task: usize,
        y: &'a mut [T],
    ) -> Step<'a> {
        let f = self.weights.units();
        // Up to where a row's bits do not depend on how far the others reach.
        let length = widest(group.points).next_multiple_of(STEP).min(f);
        let wide = std::array::from_fn(|n| &hidden[n * f..][..length]);
        let inputs = Inputs { own: [&[] as &[T]; N], wide };
        let outputs = split_outputs::<T, N>(y, per_task);
        Box::new(move |task| {
            let mut outputs = outputs[task].lock().expect("each task is run once");
            let bias = self.weights.down_bias;
            self.isa.run(Rows { weight: down, bias, inputs, from: task * per_task, outputs: &mut outputs });
        })
    }

    /// Runs every group's step on all units of all blocks; several groups take turns at pieces of a block.
    fn in_turns(&self, groups: &[Group<'_, T>], steps: &[BlockStep<'_>], vectors_of_unit: usize) {
        let piece = piece_of(vectors_of_unit * self.weights.hidden_size() * size_of::<T>());
        self.team.run(groups[0].chosen.len(), &|b| {
            let longest = groups.iter().map(|group| group.chosen[b].len()).max().unwrap_or(0);
            let piece = if groups.len() == 1 { longest.max(1) } else { piece };
            for from in (0..longest.max(1)).step_by(piece) {
                for step in steps {
                    step(b, from, from + piece);
                }
            }
        });
    }
}
