//! The planner of strips and row groups: it covers the staircase, and no other choice of cuts is cheaper.

use proptest::prelude::*;
use sedac_core::{CostGrid, Error, RowGroup, Strip, StripPlanner, WORTH_A_CHANGE};

const TOKENS: [f64; 4] = [1.0, 8.0, 64.0, 512.0];
const UNITS: [f64; 3] = [16.0, 128.0, 1024.0];

fn grid() -> impl Strategy<Value = CostGrid> {
    prop::collection::vec(1e-7_f64..1e-2, TOKENS.len() * UNITS.len())
        .prop_map(|seconds| CostGrid::new(&TOKENS, &UNITS, &seconds).unwrap())
}

/// (width, row after the last token of it), widths falling, some of them equal or 0.
fn ends() -> impl Strategy<Value = Vec<(usize, usize)>> {
    prop::collection::vec((0_usize..1200, 1_usize..200), 0..8).prop_map(|mut runs| {
        runs.sort_unstable_by_key(|run| std::cmp::Reverse(run.0));
        let mut row = 0;
        runs.iter()
            .map(|&(width, tokens)| {
                row += tokens;
                (width, row)
            })
            .collect()
    })
}

fn wider_than(ends: &[(usize, usize)], units: usize) -> usize {
    ends.iter().filter(|end| end.0 > units).map(|end| end.1).max().unwrap_or(0)
}

fn widths(ends: &[(usize, usize)]) -> Vec<usize> {
    let mut widths: Vec<usize> = ends.iter().map(|end| end.0).filter(|&width| width > 0).collect();
    widths.sort_unstable();
    widths.dedup();
    widths
}

/// Every subset of `of`, as lists in the same order.
fn subsets(of: &[usize]) -> Vec<Vec<usize>> {
    (0_usize..1 << of.len())
        .map(|chosen| of.iter().enumerate().filter(|(i, _)| chosen >> i & 1 == 1).map(|(_, &x)| x).collect())
        .collect()
}

fn strips_price(grid: &CostGrid, strips: &[Strip]) -> f64 {
    strips.iter().map(|strip| grid.seconds(strip.tokens, strip.hi - strip.lo)).sum()
}

fn groups_price(grid: &CostGrid, groups: &[RowGroup]) -> f64 {
    groups.iter().map(|group| grid.seconds(group.hi - group.lo, group.width)).sum()
}

proptest! {
    #[test]
    fn strips_cover_the_staircase_and_are_cheapest(grid in grid(), ends in ends()) {
        let strips = StripPlanner::new(grid.clone(), None).strips(&ends).unwrap();
        let widths = widths(&ends);
        let mut next = 0;
        for strip in &strips {
            prop_assert_eq!(strip.lo, next);
            prop_assert!(widths.contains(&strip.hi));
            prop_assert_eq!(strip.tokens, wider_than(&ends, strip.lo));
            prop_assert_eq!(strip.whole, wider_than(&ends, strip.hi - 1));
            next = strip.hi;
        }
        prop_assert_eq!(next, widths.last().copied().unwrap_or(0));
        prop_assert!(strips.windows(2).all(|pair| pair[0].tokens > pair[1].tokens));

        let Some((&widest, inner)) = widths.split_last() else { return Ok(()) };
        let got = strips_price(&grid, &strips);
        for mut cuts in subsets(inner) { // the empty one is a single strip, the full one a strip per width
            cuts.push(widest);
            let starts = std::iter::once(0).chain(cuts.iter().copied());
            let price: f64 = starts.zip(&cuts).map(|(lo, &hi)| grid.seconds(wider_than(&ends, lo), hi - lo)).sum();
            prop_assert!(got <= price * (1.0 + 1e-12), "{} > {} for {:?}", got, price, cuts);
        }
    }

    #[test]
    fn groups_cover_the_rows_and_are_cheapest(grid in grid(), ends in ends()) {
        let groups = StripPlanner::new(grid.clone(), None).groups(&ends).unwrap();
        let rows = wider_than(&ends, 0);
        let width_at = |row: usize| ends.iter().find(|end| end.1 > row).unwrap().0;
        let mut next = 0;
        for group in &groups {
            prop_assert_eq!(group.lo, next);
            prop_assert_eq!(group.width, width_at(group.lo));
            next = group.hi;
        }
        prop_assert_eq!(next, rows);

        let boundaries: Vec<usize> = ends.iter().filter(|end| end.0 > 0).map(|end| end.1).collect();
        let Some((_, inner)) = boundaries.split_last() else { return Ok(()) };
        let got = groups_price(&grid, &groups);
        for mut cuts in subsets(inner) {
            cuts.push(rows);
            let starts = std::iter::once(0).chain(cuts.iter().copied());
            let price: f64 = starts.zip(&cuts).map(|(lo, &hi)| grid.seconds(hi - lo, width_at(lo))).sum();
            prop_assert!(got <= price * (1.0 + 1e-12), "{} > {} for {:?}", got, price, cuts);
        }
    }

    #[test]
    fn a_measure_changes_the_cuts_only_where_it_is_worth_it(prior in grid(), measured in grid(), ends in ends()) {
        let by = |prior: &CostGrid, measured| StripPlanner::new(prior.clone(), measured).strips(&ends).unwrap();
        let (first, best) = (by(&prior, None), by(&measured, None));
        let got = by(&prior, Some(measured.clone()));
        let [first_price, best_price] = [&first, &best].map(|strips| strips_price(&measured, strips));
        let change = best_price < (1.0 - WORTH_A_CHANGE) * first_price;
        prop_assert_eq!(got, if change { best } else { first });
    }

    #[test]
    fn costs_rise_with_the_grid(tokens in 1_usize..3000, units in 1_usize..5000, more in 0_usize..500) {
        let rising: Vec<f64> = TOKENS.iter().flat_map(|n| UNITS.map(|u| 1e-6 + 1e-9 * n * u)).collect();
        let grid = CostGrid::new(&TOKENS, &UNITS, &rising).unwrap();
        let here = grid.seconds(tokens, units);
        prop_assert!(here > 0.0);
        prop_assert!(here <= grid.seconds(tokens + more, units) * (1.0 + 1e-12));
        prop_assert!(here <= grid.seconds(tokens, units + more) * (1.0 + 1e-12));
    }
}

#[test]
fn grid_points_are_exact_and_beyond_the_grid_time_is_in_proportion() {
    let seconds: Vec<f64> = (1..=12_u32).map(|i| f64::from(i) * 1e-4).collect();
    let grid = CostGrid::new(&TOKENS, &UNITS, &seconds).unwrap();
    let close = |got: f64, want: f64| assert!((got - want).abs() <= want * 1e-12, "{got} {want}");
    close(grid.seconds(8, 128), 5e-4);
    close(grid.seconds(512, 1024), 12e-4);
    close(grid.seconds(1024, 2048), 48e-4);
    close(grid.seconds(1, 3), 1e-4); // below the first column
    close(grid.seconds(0, 16) + grid.seconds(1, 0), 0.0);
}

#[test]
fn bad_grids_and_ends_are_refused() {
    let ones = [1.0; 12];
    assert!(matches!(CostGrid::new(&[1.0, 1.0], &UNITS, &ones[..6]), Err(Error::OutOfRange { .. })));
    assert!(matches!(CostGrid::new(&[], &UNITS, &[]), Err(Error::OutOfRange { .. })));
    assert!(matches!(CostGrid::new(&TOKENS, &UNITS, &ones[..11]), Err(Error::Length { .. })));
    for bad in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        let mut seconds = ones;
        seconds[7] = bad;
        assert!(matches!(CostGrid::new(&TOKENS, &UNITS, &seconds), Err(Error::OutOfRange { .. })), "{bad}");
    }
    let planner = StripPlanner::new(CostGrid::new(&TOKENS, &UNITS, &ones).unwrap(), None);
    for ends in [[(1, 4), (2, 8)], [(2, 8), (1, 4)]] {
        assert!(planner.strips(&ends).is_err());
        assert!(planner.groups(&ends).is_err());
    }
}
