//! Calls that do not fit.

use half::bf16;
use sedac_kernels::{
    ffn, linear, Activation, Down, Error, Ffn, Isa, Matrix, Point, Serial, Shadow, MAX_ROWS,
};

const F: usize = 20;
const D: usize = 6;
const WHOLE: Point = Point { width: F, importance_min: 0.0 };

fn plain(data: &[f32]) -> Ffn<'_, f32> {
    Ffn {
        gate: None,
        up: Matrix::contiguous(data, F, D).expect("fits"),
        down: Down::Columns(Matrix::contiguous(data, F, D).expect("fits")),
        gate_bias: None,
        up_bias: None,
        down_bias: None,
        activation: Activation::Silu,
    }
}

fn run(weights: &Ffn<'_, f32>, shadow: Option<Shadow<'_>>, points: &[Point]) -> Result<(), Error> {
    let x = vec![0.5; points.len() * D];
    let mut y = vec![0.0; points.len() * D];
    ffn(Isa::detect(), &Serial, weights, shadow, points, &x, &mut y, None).map(|_| ())
}

/// Which argument had the wrong size.
fn wrong_size(result: Result<(), Error>) -> &'static str {
    match result {
        Err(Error::Size { what, .. }) => what,
        other => panic!("{other:?} is not about a size"),
    }
}

#[test]
fn weights_that_do_not_fit_one_another() {
    let data = [0.1; 2 * F * D];
    let good = plain(&data);
    assert_eq!(run(&good, None, &[WHOLE]), Ok(()));
    let matrix = |rows, columns| Matrix::contiguous(&data, rows, columns).expect("fits");
    for (rows, columns) in [(F + 1, D), (F, D + 1)] {
        assert_eq!(
            wrong_size(run(&Ffn { gate: Some(matrix(rows, columns)), ..good }, None, &[WHOLE])),
            "gate"
        );
        let down = Down::Columns(matrix(rows, columns));
        assert_eq!(wrong_size(run(&Ffn { down, ..good }, None, &[WHOLE])), "down");
        let down = Down::Rows(matrix(columns, rows));
        assert_eq!(wrong_size(run(&Ffn { down, ..good }, None, &[WHOLE])), "down");
    }
    let short = Some(&data[..D - 1]);
    assert_eq!(wrong_size(run(&Ffn { gate_bias: short, ..good }, None, &[WHOLE])), "gate_bias");
    assert_eq!(wrong_size(run(&Ffn { up_bias: short, ..good }, None, &[WHOLE])), "up_bias");
    assert_eq!(wrong_size(run(&Ffn { down_bias: short, ..good }, None, &[WHOLE])), "down_bias");
}

#[test]
fn rows_that_do_not_fit() {
    let data = [0.1; F * D];
    let weights = plain(&data);
    let run = |x: usize, y: usize, hidden: usize| {
        let (x, mut y, mut hidden) = (vec![0.5; x], vec![0.0; y], vec![0.0; hidden]);
        let points = [WHOLE, WHOLE];
        ffn(Isa::detect(), &Serial, &weights, None, &points, &x, &mut y, Some(&mut hidden)).map(|_| ())
    };
    assert_eq!(run(2 * D, 2 * D, 2 * F), Ok(()));
    assert_eq!(wrong_size(run(2 * D - 1, 2 * D, 2 * F)), "x");
    assert_eq!(wrong_size(run(2 * D, D, 2 * F)), "y");
    assert_eq!(wrong_size(run(2 * D, 2 * D, 2 * F + 1)), "hidden");
}

#[test]
fn no_rows_and_too_many() {
    let data = [0.1; F * D];
    for got in [0, MAX_ROWS + 1] {
        assert_eq!(run(&plain(&data), None, &vec![WHOLE; got]), Err(Error::Rows { got }));
        let (x, mut y) = (vec![0.5; got * D], vec![0.0; got * F]);
        let weight = Matrix::contiguous(&data, F, D).expect("fits");
        let result = linear(Isa::detect(), &Serial, weight, None, &x, &mut y, got);
        assert_eq!(result, Err(Error::Rows { got }));
    }
}

#[test]
fn ffns_without_inputs() {
    let matrix = Matrix::contiguous(&[0.0_f32; 0], F, 0).expect("fits");
    let weights = Ffn { up: matrix, down: Down::Columns(matrix), ..plain(&[0.1; F * D]) };
    let result = ffn(Isa::detect(), &Serial, &weights, None, &[WHOLE], &[], &mut [], None);
    assert_eq!(wrong_size(result.map(|_| ())), "up");
}

#[test]
fn shadows_that_are_missing_or_of_another_ffn() {
    let data = [0.1; F * D];
    let weights = plain(&data);
    let chooses = Point { importance_min: 0.1, ..WHOLE };
    assert_eq!(run(&weights, None, &[WHOLE, chooses]), Err(Error::NoShadow));
    // (units, inputs) of the shadow, and whether it fits
    for (units, inputs, fits) in [(F, D, true), (F - 1, D, false), (F, D + 1, false), (F, 65, false)] {
        let (blocks, groups) = (units.div_ceil(16), usize::div_ceil(inputs, 64));
        let (codes, scales) = (vec![0; blocks * groups * 512], vec![bf16::ONE; blocks * groups * 16]);
        let norms = vec![1.0; units];
        let shadow = Shadow::new(&codes, &scales, None, &norms, inputs).expect("fits itself");
        assert_eq!(shadow.units(), units);
        for points in [[WHOLE, chooses], [WHOLE, WHOLE]] {
            let result = run(&weights, Some(shadow), &points);
            if fits {
                assert_eq!(result, Ok(()));
            } else {
                assert_eq!(wrong_size(result), "shadow");
            }
        }
    }
}

#[test]
fn shadows_that_do_not_fit_themselves() {
    let (norms, scales) = ([1.0; 17], [bf16::ONE; 64]);
    let new = |codes, scales, bias| Shadow::new(codes, scales, bias, &norms, 65).map(|_| ());
    assert_eq!(new(&[0; 4 * 512], &scales, Some(&norms)), Ok(()));
    assert_eq!(wrong_size(new(&[0; 4 * 512 - 1], &scales, None)), "codes");
    assert_eq!(wrong_size(new(&[0; 4 * 512], &scales[1..], None)), "scales");
    assert_eq!(wrong_size(new(&[0; 4 * 512], &scales, Some(&norms[1..]))), "bias");
}

#[test]
fn matrices_that_do_not_fit_their_memory() {
    let data = [0.0_f32; 10];
    for (rows, columns, stride) in [(2, 6, 6), (3, 2, 5), (2, 3, 2), (usize::MAX, 2, 2), (2, 2, usize::MAX)] {
        assert_eq!(wrong_size(Matrix::new(&data, rows, columns, stride).map(|_| ())), "data");
    }
    assert!(Matrix::new(&data, 2, 5, 5).is_ok() && Matrix::new(&data, 2, 4, 6).is_ok());
    assert!(Matrix::new(&data, 0, 100, 100).is_ok());
}

#[test]
fn linear_maps_that_do_not_fit() {
    let data = [0.1_f32; F * D];
    let run = |x: usize, y: usize, bias: usize| {
        let weight = Matrix::contiguous(&data, F, D).expect("fits");
        let (x, mut y) = (vec![0.5; x], vec![0.0; y]);
        linear(Isa::detect(), &Serial, weight, Some(&data[..bias]), &x, &mut y, 1)
    };
    assert_eq!(run(D, F, F), Ok(()));
    assert_eq!(wrong_size(run(D + 1, F, F)), "x");
    assert_eq!(wrong_size(run(D, F + 1, F)), "y");
    assert_eq!(wrong_size(run(D, F, F - 1)), "bias");
}

#[test]
fn names_of_activations() {
    for (name, activation) in Activation::ALL {
        assert_eq!(name.parse(), Ok(activation));
    }
    assert_eq!("swish".parse::<Activation>(), Err(Error::Activation("swish".to_owned())));
}
