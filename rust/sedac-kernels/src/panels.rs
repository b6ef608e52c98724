//! A product of many rows with a matrix in bf16 that lies by inputs: down's weights as they lie by units.
//!
//! Libraries make such a product by first bringing the whole matrix into another order, which for some dozen rows takes
//! longer than the product. Here a panel of columns is brought into pairs of inputs, as the machine's products want
//! them, a few inputs at a time, and used for all rows while it is in the first-level cache (the scheme of Goto and
//! van de Geijn, "Anatomy of High-Performance Matrix Multiplication", 2008).

use std::sync::Mutex;

use half::bf16;

use crate::{
    arch::{Isa, Kernel, Simd, LANE_UNITS},
    groups::{rows_of_group, with_rows},
    matrix::Matrix,
    team::Team,
    Error,
};

/// Vectors of columns in a panel: the sums of six rows fill the registers of AVX-512.
const VECTORS: usize = 4;
/// Columns in a panel of the widest vectors.
const PANEL: usize = VECTORS * LANE_UNITS;
/// Pairs of inputs that a panel holds at a time.
const PAIRS: usize = 32;
/// Panels of a task, at most: enough for rows of the matrix to be read in long runs.
const PANELS: usize = 8;

/// `y = x M + b` for `rows` rows: x `[rows][rows of M]`, y `[rows][columns of M]`. Sums are in `f32`; a row's bits depend
/// neither on the other rows nor on the threads.
///
/// # Errors
///
/// [`Error::Size`] where a slice does not fit.
pub fn product(
    isa: Isa,
    team: &dyn Team,
    matrix: Matrix<'_, bf16>,
    bias: Option<&[bf16]>,
    x: &[bf16],
    y: &mut [bf16],
    rows: usize,
) -> Result<(), Error> {
    let outputs = matrix.columns();
    for (what, got, wanted) in [
        ("x", x.len(), rows * matrix.rows()),
        ("y", y.len(), rows * outputs),
        ("bias", bias.map_or(outputs, <[bf16]>::len), outputs),
    ] {
        if got != wanted {
            return Err(Error::size(what, wanted, got));
        }
    }
    if y.is_empty() {
        return Ok(());
    }
    let panels = outputs.div_ceil(PANEL);
    let width = PANEL * panels.div_ceil(panels.div_ceil(PANELS).next_multiple_of(team.threads()));
    let mut slabs: Vec<Vec<&mut [bf16]>> = Vec::new();
    slabs.resize_with(outputs.div_ceil(width), Vec::new);
    for row in y.chunks_exact_mut(outputs) {
        slabs.iter_mut().zip(row.chunks_mut(width)).for_each(|(slab, part)| slab.push(part));
    }
    let slabs: Vec<_> = slabs.into_iter().map(Mutex::new).collect();
    team.run(slabs.len(), &|i| {
        isa.run(Slab { matrix, bias, x, from: i * width, outputs: &slabs[i] });
    });
    Ok(())
}

/// Columns `from..` of the product, as many as the outputs of each row are long.
struct Slab<'a, 'b> {
    matrix: Matrix<'a, bf16>,
    bias: Option<&'a [bf16]>,
    x: &'a [bf16],
    from: usize,
    outputs: &'a Mutex<Vec<&'b mut [bf16]>>,
}

impl Kernel for Slab<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { matrix, bias, x, from, outputs } = self;
        let mut outputs = outputs.lock().expect("each task is run once");
        let (inputs, rows, width) = (matrix.rows(), outputs.len(), outputs[0].len());
        let (panel, of_group) = (VECTORS * S::LANES, rows_of_group(rows));
        let panels = width.div_ceil(panel);
        // By panel, then by row; by panel, then by pair.
        let mut sums = vec![[simd.splat(0.0); VECTORS]; panels * rows];
        let none = [bf16::ZERO; LANE_UNITS];
        let mut packed = vec![[simd.pairs(&none, &none, 0); VECTORS]; panels * PAIRS];
        let mut near = vec![[[bf16::ZERO; 2]; PAIRS]; rows];
        for first in (0..inputs).step_by(2 * PAIRS) {
            let count = (inputs - first).min(2 * PAIRS);
            for p in 0..count.div_ceil(2) {
                let input = first + 2 * p;
                let both =
                    [matrix.row_near(input), matrix.row_near(input + 1)].map(|row| &row[from..from + width]);
                let whole = if input + 1 < inputs { width / panel } else { 0 };
                for c in 0..whole {
                    packed[c * PAIRS + p] =
                        std::array::from_fn(|v| simd.pairs(both[0], both[1], c * panel + v * S::LANES));
                }
                for c in whole..panels {
                    // Zeros behind the last column, and for the second of a pair that has none.
                    let mut padded = [[bf16::ZERO; PANEL]; 2];
                    for (row, padded) in both.iter().zip(&mut padded).take(inputs - input) {
                        let row = &row[c * panel..width.min((c + 1) * panel)];
                        padded[..row.len()].copy_from_slice(row);
                    }
                    packed[c * PAIRS + p] =
                        std::array::from_fn(|v| simd.pairs(&padded[0], &padded[1], v * S::LANES));
                }
            }
            for (near, x) in near.iter_mut().zip(x.chunks_exact(inputs)) {
                let near = near.as_flattened_mut();
                near[..count].copy_from_slice(&x[first..first + count]);
                near[count..].fill(bf16::ZERO);
            }
            for (c, (sums, pairs)) in sums.chunks_mut(rows).zip(packed.chunks(PAIRS)).enumerate() {
                for (g, (sums, x)) in sums.chunks_mut(of_group).zip(near.chunks(of_group)).enumerate() {
                    let next = (g == 0).then_some((first + 2 * PAIRS, from + c * panel));
                    let group = Group { simd, matrix, pairs: &pairs[..count.div_ceil(2)], x, next };
                    with_rows!(sums.len(), group.add(sums));
                }
            }
        }
        for (n, output) in outputs.iter_mut().enumerate() {
            for (c, output) in output.chunks_mut(panel).enumerate() {
                let mut values = [0.0; PANEL];
                for (v, sum) in sums[c * rows + n].iter().enumerate() {
                    simd.put(*sum, &mut values[v * S::LANES..]);
                }
                for (i, output) in output.iter_mut().enumerate() {
                    let bias = bias.map_or(0.0, |bias| bias[from + c * panel + i].to_f32());
                    *output = bf16::from_f32(values[i] + bias);
                }
            }
        }
    }
}

/// What some inputs add to the sums of a few rows.
struct Group<'a, S: Simd> {
    simd: S,
    matrix: Matrix<'a, bf16>,
    pairs: &'a [[S::Pairs; VECTORS]],
    x: &'a [[[bf16; 2]; PAIRS]],
    /// From which input and column on the panel is packed next: to be brought near, bit by bit, since a core whose queue
    /// of misses is full drops requests.
    next: Option<(usize, usize)>,
}

impl<S: Simd> Group<'_, S> {
    #[inline(always)]
    fn add<const N: usize>(&self, sums: &mut [[S::F32s; VECTORS]]) {
        let Self { simd, matrix, pairs, x, next } = *self;
        let mut totals = [[simd.splat(0.0); VECTORS]; N];
        totals.copy_from_slice(sums);
        let x = &x[..N];
        for (p, pair) in pairs.iter().enumerate().take(PAIRS) {
            if let Some((input, column)) = next {
                for i in 0..2 {
                    let row = matrix.row_near(input + 2 * p + i);
                    simd.prefetch(row, column);
                    simd.prefetch(row, column + 32);
                }
            }
            for n in 0..N {
                for v in 0..VECTORS {
                    totals[n][v] = simd.add_pairs(pair[v], x[n][p], totals[n][v]);
                }
            }
        }
        sums.copy_from_slice(&totals);
    }
}
