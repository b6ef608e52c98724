//! Random FFNs and calls: what proptest draws and shrinks is a small description, numbers follow from its seed.

use half::{bf16, f16};
use proptest::prelude::*;
use sedac_kernels::{ffn, Activation, Down, Element, Ffn, Isa, Matrix, Point, Shadow, Team, Used};

use crate::reference;

/// What the tests must know about an element type.
pub(crate) trait Float: Element {
    /// Largest relative error of a rounding.
    const ROUNDING: f64;
    /// Largest error of rounding a number so small that the relative one does not hold.
    const SMALLEST: f64;

    fn exact(self) -> f64 {
        f64::from(self.to_f32())
    }

    /// Equal for equal bits, and for any two NaN.
    fn bits(self) -> u32 {
        let value = self.to_f32();
        if value.is_nan() {
            u32::MAX
        } else {
            value.to_bits()
        }
    }
}

impl Float for f32 {
    const ROUNDING: f64 = 1.0 / (1 << 24) as f64;
    const SMALLEST: f64 = 1e-36;
}

impl Float for bf16 {
    const ROUNDING: f64 = 1.0 / (1 << 8) as f64;
    const SMALLEST: f64 = 1e-36;
}

impl Float for f16 {
    const ROUNDING: f64 = 1.0 / (1 << 11) as f64;
    const SMALLEST: f64 = 1.0 / (1 << 25) as f64;
}

/// Numbers without a pattern (splitmix64).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// In -1..1.
    pub(crate) fn uniform(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    pub(crate) fn values<T: Element>(&mut self, count: usize, size: f32) -> Vec<T> {
        (0..count).map(|_| T::from_f32(self.uniform() * size)).collect()
    }
}

/// A matrix whose memory ends with its last row, and has NaN between the rows.
#[derive(Debug)]
pub(crate) struct Strided<T> {
    pub(crate) data: Vec<T>,
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    pub(crate) stride: usize,
}

impl<T: Float> Strided<T> {
    pub(crate) fn random(rows: usize, columns: usize, gap: usize, size: f32, random: &mut Random) -> Self {
        let stride = columns + gap;
        let length = if rows == 0 { 0 } else { (rows - 1) * stride + columns };
        let value = |i| if i % stride < columns { random.uniform() * size } else { f32::NAN };
        Self { data: (0..length).map(value).map(T::from_f32).collect(), rows, columns, stride }
    }

    pub(crate) fn at(&self, row: usize, column: usize) -> f64 {
        assert!(column < self.columns);
        self.data[row * self.stride + column].exact()
    }

    pub(crate) fn matrix(&self) -> Matrix<'_, T> {
        Matrix::new(&self.data, self.rows, self.columns, self.stride).expect("rows that fit")
    }
}

/// How a row chooses.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Choice {
    /// All units up to its width.
    All,
    /// Those whose importance is at least that of the unit at this place of the order of importances, 0..1.
    Quantile(f64),
    /// Nothing that is a number.
    Above(f32),
}

/// What a row of activations is like.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Input {
    Ordinary,
    Zero,
    /// Has a NaN somewhere.
    NaN,
    /// Has an infinity somewhere.
    Infinite,
}

/// One row of a call.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Row {
    /// Of the units; above 1 means wider than the FFN.
    pub(crate) width: f64,
    pub(crate) choice: Choice,
    pub(crate) input: Input,
}

#[derive(Clone, Debug)]
pub(crate) struct Spec {
    pub(crate) units: usize,
    pub(crate) hidden_size: usize,
    pub(crate) gated: bool,
    /// Gate's, up's, down's, the shadow's.
    pub(crate) biases: [bool; 4],
    pub(crate) down_by_columns: bool,
    /// Elements between the rows of gate, up and down.
    pub(crate) gaps: [usize; 3],
    pub(crate) activation: Activation,
    pub(crate) shadow: bool,
    pub(crate) rows: Vec<Row>,
    pub(crate) seed: u64,
}

fn width() -> impl Strategy<Value = f64> {
    prop_oneof![1 => Just(0.0), 3 => Just(1.0), 1 => Just(1.5), 5 => 0.0..1.0]
}

fn row(usual: bool) -> impl Strategy<Value = Row> {
    let choice = prop_oneof![
        2 => Just(Choice::All),
        6 => (0.0..=1.0).prop_map(Choice::Quantile),
        1 => prop_oneof![Just(1e30_f32), Just(f32::INFINITY)].prop_map(Choice::Above),
    ];
    let rare = u32::from(!usual);
    let input = prop_oneof![
        12 => Just(Input::Ordinary),
        1 => Just(Input::Zero),
        rare => Just(Input::NaN),
        rare => Just(Input::Infinite),
    ];
    (width(), choice, input).prop_map(|(width, choice, input)| Row { width, choice, input })
}

/// `usual`: every input is a number.
pub(crate) fn spec(usual: bool) -> impl Strategy<Value = Spec> {
    let size = prop_oneof![
        6 => (0_usize..340, 1_usize..200),
        1 => (520_usize..1100, 1_usize..40),
        2 => (0_usize..20, 1_usize..20),
    ];
    let activation = (0..Activation::ALL.len()).prop_map(|i| Activation::ALL[i].1);
    let gap = || prop_oneof![2 => Just(0_usize), 1 => 1_usize..40];
    let weights = (size, any::<bool>(), any::<[bool; 4]>(), any::<bool>(), (gap(), gap(), gap()), activation);
    let rows = prop::collection::vec(row(usual), 1..=4);
    (weights, prop::bool::weighted(0.8), rows, any::<u64>()).prop_map(|(weights, shadow, mut rows, seed)| {
        let ((units, hidden_size), gated, biases, down_by_columns, gaps, activation) = weights;
        if !shadow {
            rows.iter_mut().for_each(|row| row.choice = Choice::All);
        }
        let gaps = [gaps.0, gaps.1, gaps.2];
        Spec { units, hidden_size, gated, biases, down_by_columns, gaps, activation, shadow, rows, seed }
    })
}

/// FFNs so large that the sum of the parts is shared out too.
pub(crate) fn large() -> [Spec; 2] {
    let row = |width, choice| Row { width, choice, input: Input::Ordinary };
    [true, false].map(|down_by_columns| Spec {
        units: 1040,
        hidden_size: 530,
        gated: true,
        biases: [true; 4],
        down_by_columns,
        gaps: [0, 7, 32],
        activation: Activation::Silu,
        shadow: true,
        rows: vec![
            row(1.0, Choice::Quantile(0.8)),
            row(0.3, Choice::All),
            row(1.0, Choice::All),
            row(0.77, Choice::Quantile(0.4)),
        ],
        seed: 4,
    })
}

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
