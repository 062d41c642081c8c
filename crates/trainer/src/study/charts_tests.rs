//! The pictures are well formed, hold no NaN and name what they show.
use super::*;
use crate::study::testing::well_formed;

fn point(x: f64, mean: f64, error: Option<f64>) -> CurvePoint {
    CurvePoint { x, mean, error }
}

fn curves(series: Vec<Series>) -> Curves {
    Curves {
        title: "Loss & more".to_owned(),
        x_label: "step".to_owned(),
        y_label: "loss <nats>".to_owned(),
        log_x: false,
        marks: true,
        y_limits: (f64::NEG_INFINITY, f64::INFINITY),
        series,
    }
}

#[test]
fn curves_are_well_formed_whatever_their_values() {
    let series = |name: &str, points: Vec<CurvePoint>| Series {
        name: name.to_owned(),
        colour: 9,
        note: "n < 3".to_owned(),
        points,
    };
    let usual =
        series("lora", vec![point(1.0, 8.0, Some(0.1)), point(50.0, 0.01, Some(0.5)), point(100.0, 0.02, None)]);
    let cases = [
        vec![],
        vec![usual.clone()],
        vec![usual.clone(), series("a <b> & \"c\"", vec![point(5.0, 3.0, None)])],
        vec![series("bad", vec![point(1.0, f64::NAN, None), point(2.0, f64::INFINITY, Some(f64::NAN))]), usual],
        vec![series("flat", vec![point(1.0, 0.0, Some(0.0)), point(2.0, 0.0, Some(0.0))])],
        vec![series("empty", vec![])],
    ];
    for case in cases {
        let svg = curves(case.clone()).svg();
        well_formed(&svg);
        for series in case.iter().filter(|series| series.points.iter().any(|point| point.mean.is_finite())) {
            assert!(svg.contains(&format!(">{}</text>", escape(&series.name))), "{} is not named", series.name);
        }
    }
    let svg = curves(vec![series("one", vec![point(1.0, 2.0, Some(0.1)), point(2.0, 1.0, Some(0.2))])]).svg();
    assert!(svg.contains("class=\"series s1 dash\""), "the ninth colour is the first one dashed: {svg}");
    assert!(svg.contains("<title>n &lt; 3</title>") && svg.contains("class=\"band\""));
    assert!(svg.contains("one, step 2: 1.0000 ± 0.2"));
}
