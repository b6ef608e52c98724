//! The file that the Python tests read too: decisions, cut points, threshold updates and plans.

use std::path::Path;

use sedac_core::{CascadeConfig, CascadeController, KeepLevels, LayerConfig, LevelPlan};
use serde::Deserialize;

#[derive(Deserialize)]
struct Golden {
    cases: Vec<Case>,
    cut_points: Vec<CutPoints>,
    updates: Vec<Update>,
    plans: Vec<Plan>,
}

#[derive(Deserialize)]
struct Case {
    name: String,
    layers: Vec<(u32, String, String, String)>,
    decay: String,
    soft_exit: bool,
    n_levels: u8,
    risk: Vec<Vec<String>>,
    levels: Vec<Vec<u8>>,
    ratios: Vec<Vec<String>>,
    exited: Vec<Vec<u8>>,
    failed: Vec<Vec<u8>>,
    exit_layer: Vec<i64>,
    confidence: Vec<String>,
}

#[derive(Deserialize)]
struct CutPoints {
    n_levels: u8,
    cut_points: Vec<String>,
}

#[derive(Deserialize)]
struct Update {
    alpha: String,
    start: String,
    samples: Vec<String>,
    quantile: f64,
    after: String,
}

#[derive(Deserialize)]
struct Plan {
    n_levels: u8,
    levels: Vec<u8>,
    order: Vec<i64>,
    at_least: Vec<i64>,
}

fn golden() -> Golden {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/cascade_golden.json");
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn number(text: &str) -> f32 {
    text.parse().unwrap()
}

fn numbers(texts: &[String]) -> Vec<f32> {
    texts.iter().map(|text| number(text)).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

fn controller(case: &Case) -> CascadeController {
    let layers = case.layers.iter().map(|(layer_idx, target, threshold, weight)| {
        LayerConfig::new(*layer_idx, number(target), number(threshold), number(weight))
    });
    let config = CascadeConfig::new(layers.collect()).unwrap();
    let config = config.with_confidence_decay(number(&case.decay)).unwrap().with_soft_exit(case.soft_exit);
    CascadeController::new(config.with_n_levels(case.n_levels).unwrap())
}

fn assert_ratios(got: &[f32], expected: &[String], name: &str) {
    assert_eq!(got.len(), expected.len(), "{name}");
    for (got, expected) in got.iter().zip(expected) {
        let expected = number(expected);
        assert!((got - expected).abs() <= 1e-6, "{name}: ratio {got}, expected {expected}");
    }
}

#[test]
fn steps_give_the_golden_decisions() {
    for case in golden().cases {
        let controller = controller(&case);
        let mut pass = controller.begin(case.exit_layer.len()).unwrap();
        for (i, risk) in case.risk.iter().enumerate() {
            let levels = controller.step(&mut pass, i, &numbers(risk)).unwrap();
            let name = format!("{}, checkpoint {i}", case.name);
            assert_eq!(levels, case.levels[i], "{name}");
            let flags = |flags: Vec<bool>| flags.into_iter().map(u8::from).collect::<Vec<_>>();
            assert_eq!(flags(pass.exited()), case.exited[i], "{name}");
            assert_eq!(flags(pass.failed()), case.failed[i], "{name}");
            assert_ratios(&pass.ratio(), &case.ratios[i], &name);
        }
        assert_eq!(pass.exit_layer(), case.exit_layer, "{}", case.name);
        assert_eq!(bits(pass.confidence()), bits(&numbers(&case.confidence)), "{}", case.name);
    }
}

#[test]
fn a_batch_gives_the_golden_decisions() {
    for case in golden().cases {
        let n_tokens = case.exit_layer.len();
        let decisions = controller(&case).evaluate_batch(&numbers(&case.risk.concat()), n_tokens).unwrap();
        assert_eq!(decisions.levels, case.levels.concat(), "{}", case.name);
        assert_ratios(&decisions.ratios, &case.ratios.concat(), &case.name);
        assert_eq!(decisions.exit_layer, case.exit_layer, "{}", case.name);
        let confidence = bits(&decisions.accumulated_confidence);
        assert_eq!(confidence, bits(&numbers(&case.confidence)), "{}", case.name);
        assert_eq!(decisions.n_tokens(), n_tokens);
        for token in 0..n_tokens {
            let decision = decisions.get(token).unwrap();
            assert_eq!(
                u8::from(decision.should_exit),
                case.exited[case.risk.len() - 1][token],
                "{}",
                case.name
            );
        }
        assert!(decisions.get(n_tokens).is_none());
    }
}

#[test]
fn cut_points_are_the_golden_ones() {
    for case in golden().cut_points {
        let keep_levels = KeepLevels::new(case.n_levels).unwrap();
        assert_eq!(
            bits(keep_levels.cut_points()),
            bits(&numbers(&case.cut_points)),
            "{} levels",
            case.n_levels
        );
    }
}

#[test]
fn threshold_updates_are_the_golden_ones() {
    for case in golden().updates {
        let layer =
            LayerConfig { quantile: case.quantile, ..LayerConfig::new(4, 0.5, number(&case.start), 1.0) };
        let config = CascadeConfig::new(vec![layer]).unwrap().with_alpha(number(&case.alpha)).unwrap();
        let controller = CascadeController::new(config);
        let after = controller.update_threshold(0, &numbers(&case.samples), None).unwrap();
        assert_eq!(after.to_bits(), number(&case.after).to_bits(), "{after}, expected {}", case.after);
        assert_eq!(controller.thresholds(), [after]);
    }
}

#[test]
fn plans_are_the_golden_ones() {
    for case in golden().plans {
        let plan = LevelPlan::new(&case.levels, case.n_levels).unwrap();
        assert_eq!(plan, LevelPlan { order: case.order, at_least: case.at_least });
    }
}
