//! Images in folders, one folder a class: `root/cat/1.png`, `root/dog/2.jpg`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use lowrank_core::random::Stream;
use sha2::{Digest, Sha256};

use super::classes::{LabelRules, RawLabel, Understood, understand};
use super::error::DataError;
use super::examples::Place;
use super::pictures::{ENDINGS, ImageRules};
use super::source::{Numbering, bad_file};

/// Image files and how they are prepared.
#[derive(Debug, Clone)]
pub struct ImageFiles {
    /// How a file becomes pixels.
    pub rules: ImageRules,
    /// The files.
    pub paths: Vec<Arc<Path>>,
    /// Whether half of the images are mirrored in training.
    pub flip: bool,
    /// Seed of that choice.
    pub seed: u64,
}

impl ImageFiles {
    /// The pixels of an image, `[channels, height, width]`; `draw` is epoch and record of a training image.
    ///
    /// # Errors
    /// The file cannot be read or decoded.
    pub fn pixels(&self, index: usize, draw: Option<(u64, u64)>) -> Result<Vec<f32>, DataError> {
        let mirror = self.flip
            && draw.is_some_and(|(epoch, record)| Stream::new(self.seed ^ epoch, "flip").bits(record) & 1 == 1);
        self.rules.pixels(&self.paths[index], mirror)
    }

    /// What tells this image from another without reading it.
    pub(super) fn hash_into(&self, index: usize, hash: &mut Sha256) {
        let path = &self.paths[index];
        let bytes = std::fs::metadata(path).map_or(0, |metadata| metadata.len());
        hash.update(path.file_name().unwrap_or_default().as_encoded_bytes());
        hash.update(bytes.to_le_bytes());
        hash.update(format!("{:?} {}", self.rules, self.flip));
    }
}

/// All images below some folders, sorted by folder and name, with their classes.
///
/// # Errors
/// A folder cannot be read, holds no folders with images, or a class is not among the known ones.
pub fn read_images(roots: &[String], rules: &LabelRules) -> Result<(Vec<Place>, Understood), DataError> {
    let (mut places, mut labels): (Vec<Place>, Vec<RawLabel>) = (vec![], vec![]);
    for root in roots {
        let root = Path::new(root);
        let before = places.len();
        for class in entries(root)?.into_iter().filter(|path| path.is_dir()) {
            let Some(name) = class.file_name().and_then(|name| name.to_str()) else {
                return Err(bad_file(&class, "the folder's name is not valid UTF-8", "rename it"));
            };
            for file in entries(&class)?.into_iter().filter(|path| is_image(path)) {
                let record = places.len() as u64;
                places.push(Place { path: file.into(), numbering: Numbering::Whole, position: 0, record });
                labels.push(RawLabel::Name(name.to_owned()));
            }
        }
        if places.len() == before {
            let reason = format!("holds no folders with .{} files", ENDINGS.join(" or ."));
            return Err(bad_file(
                root,
                reason,
                "put the images of each class into a folder of its own: root/class/image.png",
            ));
        }
    }
    let understood = understand(&labels, rules, |index| places[index].to_string())?;
    Ok((places, understood))
}

fn is_image(path: &Path) -> bool {
    let ending = path.extension().and_then(|ending| ending.to_str()).unwrap_or_default().to_ascii_lowercase();
    path.is_file() && ENDINGS.contains(&ending.as_str())
}

/// What a folder holds, sorted by name; hidden entries are left out.
fn entries(folder: &Path) -> Result<Vec<PathBuf>, DataError> {
    let io = |source| DataError::Io { path: folder.to_path_buf(), source };
    let mut paths = vec![];
    for entry in std::fs::read_dir(folder).map_err(io)? {
        let path = entry.map_err(io)?.path();
        if !path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b".")) {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}
