//! A random FFN and a call, and how it is run.

use half::bf16;
use sedac_kernels::{ffn, Down, Element, Ffn, Isa, Point, Shadow, Team, Used};

use crate::{
    numbers::{Float, Random, Strided},
    reference,
    spec::{Choice, Input, Row, Spec},
};

/// A call's numbers.
#[derive(Debug)]
pub(crate) struct Case<T> {
    pub(crate) spec: Spec,
    pub(crate) gate: Option<Strided<T>>,
    pub(crate) up: Strided<T>,
    /// `[units][hidden size]`, or turned, as the spec says.
    pub(crate) down: Strided<T>,
    pub(crate) gate_bias: Option<Vec<T>>,
    pub(crate) up_bias: Option<Vec<T>>,
    pub(crate) down_bias: Option<Vec<T>>,
    pub(crate) x: Vec<T>,
    pub(crate) codes: Vec<u8>,
    pub(crate) scales: Vec<bf16>,
    pub(crate) shadow_bias: Option<Vec<f32>>,
    pub(crate) unit_norm: Vec<f32>,
    pub(crate) points: Vec<Point>,
}

impl<T: Float> Case<T> {
    pub(crate) fn of(spec: &Spec) -> Self {
        let (f, d) = (spec.units, spec.hidden_size);
        let mut random = Random(spec.seed);
        let (size, down_size) = (2.0 / (d as f32).sqrt(), 2.0 / (f.max(1) as f32).sqrt());
        let gate = spec.gated.then(|| Strided::random(f, d, spec.gaps[0], size, &mut random));
        let up = Strided::random(f, d, spec.gaps[1], size, &mut random);
        let (rows, columns) = if spec.down_by_columns { (f, d) } else { (d, f) };
        let down = Strided::random(rows, columns, spec.gaps[2], down_size, &mut random);
        let [gate_bias, up_bias, down_bias] = [(0, f), (1, f), (2, d)]
            .map(|(which, length)| spec.biases[which].then(|| random.values(length, 0.5)));
        let (groups, blocks) = (d.div_ceil(64), f.div_ceil(16));
        let codes = (0..blocks * groups * 512).map(|_| random.next() as u8).collect();
        // Codes reach 8 and inputs 127: about 1 is what comes out.
        let scales = (0..blocks * groups * 16).map(|_| random.uniform() * size / 8.0);
        let scales = scales.map(bf16::from_f32).collect();
        let shadow_bias = spec.biases[3].then(|| random.values(f, 0.5));
        let unit_norm = (0..f).map(|_| random.uniform().abs()).collect();
        let x = spec.rows.iter().flat_map(|row| input_row(row.input, d, &mut random)).collect();
        let mut case = Self {
            spec: spec.clone(),
            gate,
            up,
            down,
            gate_bias,
            up_bias,
            down_bias,
            x,
            codes,
            scales,
            shadow_bias,
            unit_norm,
            points: Vec::new(),
        };
        case.points = spec.rows.iter().enumerate().map(|(n, row)| case.point(n, row)).collect();
        case
    }

    fn point(&self, n: usize, row: &Row) -> Point {
        let width = (row.width * self.spec.units as f64).round() as usize;
        let importance_min = match row.choice {
            Choice::All => 0.0,
            Choice::Above(least) => least,
            Choice::Quantile(q) => {
                let mut all: Vec<_> =
                    reference::importances(self, n).into_iter().map(|(value, _)| value as f32).collect();
                all.retain(|value| value.is_finite());
                all.sort_by(f32::total_cmp);
                let place = (q * all.len().saturating_sub(1) as f64) as usize;
                all.get(place).copied().unwrap_or(0.5)
            }
        };
        Point { width, importance_min }
    }

    pub(crate) fn weights(&self) -> Ffn<'_, T> {
        let down = self.down.matrix();
        Ffn {
            gate: self.gate.as_ref().map(Strided::matrix),
            up: self.up.matrix(),
            down: if self.spec.down_by_columns { Down::Columns(down) } else { Down::Rows(down) },
            gate_bias: self.gate_bias.as_deref(),
            up_bias: self.up_bias.as_deref(),
            down_bias: self.down_bias.as_deref(),
            activation: self.spec.activation,
        }
    }

    pub(crate) fn shadow(&self) -> Shadow<'_> {
        let (bias, d) = (self.shadow_bias.as_deref(), self.spec.hidden_size);
        Shadow::new(&self.codes, &self.scales, bias, &self.unit_norm, d).expect("sizes that fit")
    }

    pub(crate) fn rows(&self) -> usize {
        self.points.len()
    }

    /// Runs the rows `rows`, in the middle of memory that must stay as it was.
    pub(crate) fn run(&self, isa: Isa, team: &dyn Team, rows: std::ops::Range<usize>) -> Outcome<T> {
        const GUARD: usize = 24;
        let (f, d) = (self.spec.units, self.spec.hidden_size);
        let count = rows.len();
        let mut y = vec![T::from_f32(f32::NAN); count * d + 2 * GUARD];
        let mut hidden = vec![f32::NAN; count * f + 2 * GUARD];
        let used = ffn(
            isa,
            team,
            &self.weights(),
            self.spec.shadow.then(|| self.shadow()),
            &self.points[rows.clone()],
            &self.x[rows.start * d..rows.end * d],
            &mut y[GUARD..GUARD + count * d],
            Some(&mut hidden[GUARD..GUARD + count * f]),
        );
        let around = |all: &[f32]| {
            let inside = GUARD..all.len() - GUARD;
            let outside = all.iter().enumerate().filter(|(i, _)| !inside.contains(i));
            assert!(outside.into_iter().all(|(_, value)| value.is_nan()), "written past an output's ends");
        };
        around(&y.iter().map(|value| value.to_f32()).collect::<Vec<_>>());
        around(&hidden);
        Outcome {
            used: used.expect("a call that fits"),
            y: y[GUARD..GUARD + count * d].to_vec(),
            hidden: hidden[GUARD..GUARD + count * f].to_vec(),
        }
    }
}

fn input_row<T: Element>(input: Input, length: usize, random: &mut Random) -> Vec<T> {
    let mut row = random.values(length, if input == Input::Zero { 0.0 } else { 1.5 });
    let place = random.next() as usize % length;
    match input {
        Input::Ordinary | Input::Zero => {}
        Input::NaN => row[place] = T::from_f32(f32::NAN),
        Input::Infinite => row[place] = T::from_f32(random.uniform().signum() * f32::INFINITY),
    }
    row
}

/// What a call gave.
#[derive(Debug)]
pub(crate) struct Outcome<T> {
    pub(crate) used: Used,
    pub(crate) y: Vec<T>,
    pub(crate) hidden: Vec<f32>,
}

impl<T: Float> Outcome<T> {
    pub(crate) fn bits(&self) -> (Used, Vec<u32>, Vec<u32>) {
        let y = self.y.iter().map(|value| value.bits());
        (self.used, y.collect(), self.hidden.iter().map(|value| value.bits()).collect())
    }
}
