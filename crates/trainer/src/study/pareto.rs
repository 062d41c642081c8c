//! Plots of quality against cost as SVG: every variant a spot with its name, and the front of those that no other one beats.

use std::fmt::Write;

use super::charts::{BOTTOM, LEFT, LETTER, TOP, WIDTH, class, frame, open, shortened};
use super::svg::{Axis, escape, line};

/// A variant in a plot of quality against cost.
#[derive(Debug, Clone, PartialEq)]
pub struct Spot {
    /// Shown beside it.
    pub name: String,
    /// Number of its colour.
    pub colour: usize,
    /// Shown when the pointer rests on it.
    pub note: String,
    /// Cost.
    pub x: f64,
    /// Quality.
    pub y: f64,
    /// Standard error of the quality.
    pub error: Option<f64>,
}

/// Quality against cost.
#[derive(Debug, Clone, PartialEq)]
pub struct Pareto {
    /// Read aloud in place of the picture.
    pub title: String,
    /// Name of the x axis.
    pub x_label: String,
    /// Name of the y axis.
    pub y_label: String,
    /// Whether x is logarithmic.
    pub log_x: bool,
    /// Whether more is better on the y axis. Less is always better on the x axis.
    pub higher: bool,
    /// The variants.
    pub spots: Vec<Spot>,
}

impl Pareto {
    /// Numbers of the spots that no other one beats in both directions, from the cheapest on.
    pub fn front(&self) -> Vec<usize> {
        let quality = |index: &usize| if self.higher { self.spots[*index].y } else { -self.spots[*index].y };
        let mut order: Vec<usize> = (0..self.spots.len()).collect();
        order.sort_by(|a, b| self.spots[*a].x.total_cmp(&self.spots[*b].x).then(quality(b).total_cmp(&quality(a))));
        let mut best = f64::NEG_INFINITY;
        order.retain(|index| {
            let better = quality(index) > best;
            best = best.max(quality(index));
            better
        });
        order
    }

    /// The whole picture. Spots that are not finite are left out.
    pub fn svg(&self) -> String {
        let mut finite = self.clone();
        finite.spots.retain(|spot| spot.x.is_finite() && spot.y.is_finite());
        for spot in &mut finite.spots {
            spot.error = spot.error.filter(|error| error.is_finite());
        }
        finite.draw()
    }

    fn draw(&self) -> String {
        let x = Axis::over(self.spots.iter().map(|spot| spot.x), self.log_x, (LEFT + 12.0, WIDTH - 30.0));
        let ends = self.spots.iter().flat_map(|spot| {
            let error = spot.error.unwrap_or(0.0);
            [spot.y - error, spot.y + error]
        });
        let y = Axis::over(ends, false, (BOTTOM - 8.0, TOP + 8.0));
        let mut svg = open(&self.title);
        frame(&mut svg, &x, &y, &self.x_label, &self.y_label);
        let front = self.front();
        self.draw_front(&mut svg, &front, &x, &y);
        let labels = self.label_boxes(&x, &y);
        for (index, (spot, label)) in self.spots.iter().zip(labels).enumerate() {
            draw_spot(&mut svg, spot, front.contains(&index), &x, &y, &label);
        }
        svg + "</svg>"
    }

    /// Steps: what quality a given cost buys.
    fn draw_front(&self, svg: &mut String, front: &[usize], x: &Axis, y: &Axis) {
        let mut corners = vec![];
        for &index in front {
            let (at_x, at_y) = (x.at(self.spots[index].x), y.at(self.spots[index].y));
            if let Some(&(_, before)) = corners.last() {
                corners.push((at_x, before));
            }
            corners.push((at_x, at_y));
        }
        if let Some(&(_, last)) = corners.last() {
            corners.push((WIDTH - 8.0, last));
        }
        let _ = write!(svg, "<path class=\"front\" d=\"{}\"/>", line(corners.into_iter()));
    }

    /// A place for every name where it covers no spot and no other name, as near as possible.
    fn label_boxes(&self, x: &Axis, y: &Axis) -> Vec<Label> {
        let mut taken: Vec<[f64; 4]> = vec![];
        for spot in &self.spots {
            let (cx, cy) = (x.at(spot.x), y.at(spot.y));
            taken.push([cx - 6.0, cy - 6.0, cx + 6.0, cy + 6.0]);
            let error = spot.error.unwrap_or(0.0);
            taken.push([cx - 1.5, y.at(spot.y + error), cx + 1.5, y.at(spot.y - error)]);
        }
        let place = |spot: &Spot| {
            let label = Label::best((x.at(spot.x), y.at(spot.y)), &shortened(&spot.name), &taken);
            taken.push(label.area);
            label
        };
        self.spots.iter().map(place).collect()
    }
}

/// A name with the area that it covers: left, top, right, bottom.
struct Label {
    area: [f64; 4],
    far: bool,
}

impl Label {
    fn best((cx, cy): (f64, f64), name: &str, taken: &[[f64; 4]]) -> Self {
        let width = name.chars().count() as f64 * LETTER;
        let mut best: Option<(f64, Self)> = None;
        for (ring, reach) in [10.0, 20.0, 32.0, 46.0, 62.0, 80.0].into_iter().enumerate() {
            for (dx, dy) in
                [(1.0, 0.0), (-1.0, 0.0), (0.0, -1.0), (0.0, 1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, -1.0), (-1.0, 1.0)]
            {
                let middle = cy + dy * if dx == 0.0 { reach + 4.0 } else { reach };
                let left = match dx {
                    0.0 => cx - width / 2.0,
                    right if right > 0.0 => cx + if dy == 0.0 { reach } else { 6.0 + 0.5 * reach },
                    _ => cx - width - if dy == 0.0 { reach } else { 6.0 + 0.5 * reach },
                };
                let area = [left, middle - 7.0, left + width, middle + 7.0];
                let outside = (LEFT + 2.0 - area[0]).max(0.0)
                    + (area[2] - WIDTH + 2.0).max(0.0)
                    + (TOP - area[1]).max(0.0)
                    + (area[3] - BOTTOM).max(0.0);
                let covered: f64 = taken.iter().map(|other| overlap(&area, other)).sum();
                let cost = covered + 40.0 * outside + 2.0 * reach;
                if best.as_ref().is_none_or(|(least, _)| cost < *least) {
                    best = Some((cost, Self { area, far: ring > 0 }));
                }
            }
        }
        best.map_or(Self { area: [cx, cy, cx, cy], far: false }, |(_, label)| label)
    }
}

fn overlap(one: &[f64; 4], other: &[f64; 4]) -> f64 {
    let width = one[2].min(other[2]) - one[0].max(other[0]);
    let height = one[3].min(other[3]) - one[1].max(other[1]);
    if width > 0.0 && height > 0.0 { 30.0 + width * height } else { 0.0 }
}

fn draw_spot(svg: &mut String, spot: &Spot, on_front: bool, x: &Axis, y: &Axis, label: &Label) {
    let (cx, cy) = (x.at(spot.x), y.at(spot.y));
    let _ = write!(svg, "<g class=\"series {}\"><title>{}</title>", class(spot.colour), escape(&spot.note));
    let [left, top, right, bottom] = label.area;
    if label.far {
        let near = (cx.clamp(left, right), if bottom < cy { bottom } else { top.max(cy.min(bottom)) });
        let _ = write!(svg, "<path class=\"leader\" d=\"M{cx:.1} {cy:.1}L{:.1} {:.1}\"/>", near.0, near.1);
    }
    if let Some(error) = spot.error {
        let (up, down) = (y.at(spot.y + error), y.at(spot.y - error));
        let _ = write!(svg, "<path class=\"error\" d=\"M{cx:.1} {up:.1}L{cx:.1} {down:.1}\"/>");
    }
    let kind = if on_front { "spot" } else { "spot hollow" };
    let _ = write!(
        svg,
        "<circle class=\"{kind}\" cx=\"{cx:.1}\" cy=\"{cy:.1}\" r=\"5\"/><text class=\"name\" x=\"{left:.1}\" y=\"{:.1}\">{}</text></g>",
        bottom - 3.0,
        escape(&shortened(&spot.name))
    );
}

#[cfg(test)]
#[path = "pareto_tests.rs"]
mod tests;
