//! What proptest draws and shrinks: a small description of an FFN and a call, from whose seed the numbers follow.

use proptest::prelude::*;
use sedac_kernels::{Activation, MAX_ROWS};

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

fn row() -> impl Strategy<Value = Row> {
    let choice = prop_oneof![
        2 => Just(Choice::All),
        6 => (0.0..=1.0).prop_map(Choice::Quantile),
        1 => prop_oneof![Just(1e30_f32), Just(f32::INFINITY)].prop_map(Choice::Above),
    ];
    let input = prop_oneof![
        12 => Just(Input::Ordinary),
        1 => Just(Input::Zero),
        1 => Just(Input::NaN),
        1 => Just(Input::Infinite),
    ];
    (width(), choice, input).prop_map(|(width, choice, input)| Row { width, choice, input })
}

/// Any call that fits.
pub(crate) fn spec() -> impl Strategy<Value = Spec> {
    let less = if cfg!(miri) { 8 } else { 1 }; // it takes a thousand times as long
    let size = prop_oneof![
        6 => (0_usize..340 / less, 1_usize..200),
        1 => (520_usize / less..1100 / less, 1_usize..40),
        2 => (0_usize..20, 1_usize..20),
    ];
    let activation = (0..Activation::ALL.len()).prop_map(|i| Activation::ALL[i].1);
    let gap = || prop_oneof![2 => Just(0_usize), 1 => 1_usize..40];
    let weights = (size, any::<bool>(), any::<[bool; 4]>(), any::<bool>(), (gap(), gap(), gap()), activation);
    let rows =
        prop_oneof![2 => 1..=4_usize, 1 => 5..=MAX_ROWS].prop_flat_map(|n| prop::collection::vec(row(), n));
    (weights, prop::bool::weighted(0.8), rows, any::<u64>()).prop_map(|(weights, shadow, mut rows, seed)| {
        let ((units, hidden_size), gated, biases, down_by_columns, gaps, activation) = weights;
        if !shadow {
            for row in &mut rows {
                row.choice = Choice::All;
            }
        }
        let gaps = [gaps.0, gaps.1, gaps.2];
        Spec { units, hidden_size, gated, biases, down_by_columns, gaps, activation, shadow, rows, seed }
    })
}

/// FFNs so large that the sum of the parts is shared out, and that groups of rows take turns within a block.
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
            row(0.5, Choice::All),
            row(1.0, Choice::Quantile(0.1)),
        ],
        seed: 4,
    })
}
