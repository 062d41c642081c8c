//! The front is the front, and names do not cover each other.
use super::*;
use crate::study::testing::well_formed;

fn spot(name: &str, x: f64, y: f64) -> Spot {
    Spot { name: name.to_owned(), colour: 0, note: format!("note of {name}"), x, y, error: Some(0.01) }
}

fn pareto(higher: bool, spots: Vec<Spot>) -> Pareto {
    Pareto {
        title: "Quality".to_owned(),
        x_label: "parameters".to_owned(),
        y_label: "loss".to_owned(),
        log_x: true,
        higher,
        spots,
    }
}

#[test]
fn the_front_is_what_no_other_beats() {
    let spots = || {
        vec![
            spot("big", 1e6, 1.0),
            spot("small", 1e3, 3.0),
            spot("bad", 1e5, 4.0),
            spot("middle", 1e4, 2.0),
            spot("twin", 1e4, 2.5),
        ]
    };
    assert_eq!(pareto(false, spots()).front(), [1, 3, 0]);
    assert_eq!(pareto(true, spots()).front(), [1, 2]);
    assert!(pareto(true, vec![]).front().is_empty());
}

#[test]
fn pareto_plots_are_well_formed_and_names_do_not_cover_each_other() {
    let crowd: Vec<Spot> = (0..13)
        .map(|i| spot(&format!("method-{i}"), 1e4 * (1.0 + 0.1 * f64::from(i)), 3.6 + 0.002 * f64::from(i)))
        .collect();
    let plot = pareto(false, crowd);
    well_formed(&plot.svg());
    let x = Axis::over(plot.spots.iter().map(|spot| spot.x), true, (LEFT + 12.0, WIDTH - 30.0));
    let y = Axis::over(plot.spots.iter().map(|spot| spot.y), false, (BOTTOM - 8.0, TOP + 8.0));
    let labels = plot.label_boxes(&x, &y);
    for (index, label) in labels.iter().enumerate() {
        for other in &labels[..index] {
            assert_eq!(overlap(&label.area, &other.area), 0.0, "{:?} {:?}", label.area, other.area);
        }
    }
    for odd in [vec![], vec![spot("only", 0.0, 0.0)], vec![spot("a", f64::NAN, 1.0), spot("b", 1.0, f64::NAN)]] {
        well_formed(&pareto(true, odd).svg());
    }
}
