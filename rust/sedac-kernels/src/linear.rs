//! A linear map of a few rows: every weight is read once.

use crate::{
    arch::{Isa, Kernel, Simd},
    element::Element,
    groups::{rows_of_group, split, with_rows},
    matrix::Matrix,
    products::{dots, four_dots, Inputs},
    rows::{split_outputs, tasks_of, widened},
    team::Team,
    Error, MAX_ROWS,
};

/// `y = x W^T + b` for `rows` rows: x `[rows][columns of W]`, y `[rows][rows of W]`.
///
/// # Errors
///
/// [`Error::Size`] where a slice does not fit, [`Error::Rows`] for more than [`MAX_ROWS`] rows or none.
pub fn linear<T: Element>(
    isa: Isa,
    team: &dyn Team,
    weight: Matrix<'_, T>,
    bias: Option<&[T]>,
    x: &[T],
    y: &mut [T],
    rows: usize,
) -> Result<(), Error> {
    if !(1..=MAX_ROWS).contains(&rows) {
        return Err(Error::Rows { got: rows });
    }
    for (what, got, wanted) in [
        ("x", x.len(), rows * weight.columns()),
        ("y", y.len(), rows * weight.rows()),
        ("bias", bias.map_or(weight.rows(), <[T]>::len), weight.rows()),
    ] {
        if got != wanted {
            return Err(Error::size(what, wanted, got));
        }
    }
    let (of_group, d) = (rows_of_group(rows), weight.columns());
    let groups = rows.div_ceil(of_group);
    let map = Map { isa, weight, bias, per_task: tasks_of(weight.rows(), team, groups, d * size_of::<T>()) };
    let wide = widened(isa, x);
    let steps: Vec<_> = (0..rows)
        .step_by(of_group)
        .zip(split(y, weight.rows(), rows))
        .map(|(from, y)| {
            let to = rows.min(from + of_group);
            with_rows!(to - from, map.of(&x[from * d..to * d], &wide[from * d..to * d], y))
        })
        .collect();
    team.run(weight.rows().div_ceil(map.per_task), &|task| steps.iter().for_each(|step| step(task)));
    Ok(())
}

struct Map<'a, T> {
    isa: Isa,
    weight: Matrix<'a, T>,
    bias: Option<&'a [T]>,
    per_task: usize,
}

impl<T: Element> Map<'_, T> {
    /// What one group does in a task.
    fn of<'a, const N: usize>(
        &'a self,
        x: &'a [T],
        wide: &'a [f32],
        y: &'a mut [T],
    ) -> Box<dyn Fn(usize) + Sync + 'a> {
        let &Self { isa, weight, bias, per_task } = self;
        let inputs = Inputs::<T, N>::new(x, wide);
        let outputs = split_outputs::<T, N>(y, per_task);
        Box::new(move |task| {
            let mut outputs = outputs[task].lock().expect("each task is run once");
            isa.run(Rows { weight, bias, inputs, from: task * per_task, outputs: &mut outputs });
        })
    }
}

/// Rows `from..` of a weight against the inputs; inputs that are `f32` alone have an empty `own`.
pub(crate) struct Rows<'a, 'b, T, const N: usize> {
    pub(crate) weight: Matrix<'a, T>,
    pub(crate) bias: Option<&'a [T]>,
    pub(crate) inputs: Inputs<'a, T, N>,
    pub(crate) from: usize,
    pub(crate) outputs: &'a mut [&'b mut [T]; N],
}

impl<T: Element, const N: usize> Kernel for Rows<'_, '_, T, N> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { weight, bias, inputs, from, outputs } = self;
        let length = inputs.wide[0].len();
        let row = |i: usize| &weight.row_near(from + i)[..length];
        let count = outputs[0].len();
        let mut put = |i: usize, products: [f32; N]| {
            let bias = bias.map_or(0.0, |bias| bias[from + i].to_f32());
            for (output, product) in outputs.iter_mut().zip(products) {
                output[i] = T::from_f32(product + bias);
            }
        };
        // Rows of four runs of memory at once, see `crate::runs`.
        let quarter = count / 4;
        for i in 0..quarter {
            let products = four_dots(
                simd,
                std::array::from_fn(|r| row(i + r * quarter)),
                &inputs,
                std::array::from_fn(|r| row(i + 1 + r * quarter)),
            );
            products.into_iter().enumerate().for_each(|(r, products)| put(i + r * quarter, products));
        }
        for i in 4 * quarter..count {
            let [products] = dots(simd, [row(i)], &inputs, []);
            put(i, products);
        }
    }
}
