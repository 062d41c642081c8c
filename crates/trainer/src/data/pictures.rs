//! An image file to the numbers that a model wants: `preprocessor_config.json` as transformers' image processors read it.
//!
//! Resized (bilinear, bicubic or nearest, by Pillow's rule), perhaps cut to its middle, scaled to [0, 1] and normalised by mean
//! and deviation of each channel.

use std::path::Path;

use image::ImageReader;
use serde_json::Value;

use super::error::DataError;
use super::resample::{Filter, Picture};
use super::source::bad_file;

/// The endings of the file names that are read.
pub const ENDINGS: [&str; 3] = ["png", "jpg", "jpeg"];

/// How the sides of an image change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resize {
    /// To this height and width.
    To([usize; 2]),
    /// The shorter side to this, the longer in proportion.
    Shorter(usize),
    /// Not at all.
    Keep,
}

/// How a file becomes pixels.
#[derive(Debug, Clone, PartialEq)]
pub struct ImageRules {
    /// 3 (red, green, blue) or 1 (grey).
    pub channels: usize,
    /// Resizing.
    pub resize: Resize,
    /// Its kernel.
    pub filter: Filter,
    /// Height and width of the middle that is kept.
    pub crop: Option<[usize; 2]>,
    /// Factor of the bytes.
    pub rescale: f32,
    /// Subtracted from each channel afterwards.
    pub mean: Vec<f32>,
    /// Divides each channel then.
    pub std: Vec<f32>,
    size: [usize; 2],
}

impl ImageRules {
    /// Reads `folder/preprocessor_config.json`; without one, images are resized to the model's size and brought to [-1, 1].
    /// `model_size` is the size that the model was made for, where it has one.
    ///
    /// # Errors
    /// The file is malformed, or makes images that the model does not take.
    pub fn read(folder: &Path, channels: usize, model_size: Option<[usize; 2]>) -> Result<Self, DataError> {
        let path = folder.join("preprocessor_config.json");
        let json = match std::fs::read_to_string(&path) {
            Ok(text) => serde_json::from_str(&text)
                .map_err(|error| bad_file(&path, format!("not valid JSON: {error}"), "fetch the file again"))?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Value::Object(serde_json::Map::new()),
            Err(source) => return Err(DataError::Io { path, source }),
        };
        let rules = Self::from_json(&json, channels, model_size)
            .map_err(|reason| bad_file(&path, reason, "use the file that came with the model"))?;
        match model_size {
            Some(size) if size != rules.size => {
                let reason = format!("makes images of {:?} (height, width), but the model takes {size:?}", rules.size);
                Err(bad_file(&path, reason, "preprocessor_config.json and config.json must be of one model"))
            }
            _ => Ok(rules),
        }
    }

    fn from_json(json: &Value, channels: usize, model_size: Option<[usize; 2]>) -> Result<Self, String> {
        if !matches!(channels, 1 | 3) {
            return Err(format!("images have 1 or 3 channels, the model wants {channels}"));
        }
        let flag = |key: &str, default: bool| json.get(key).and_then(Value::as_bool).unwrap_or(default);
        let default = model_size.unwrap_or([224, 224]);
        let mut resize = if flag("do_resize", true) { resize(json.get("size"), default)? } else { Resize::Keep };
        let mut crop = match flag("do_center_crop", false) {
            true => {
                Some(sides(json.get("crop_size")).ok_or("`crop_size`: expected height and width")?.unwrap_or(default))
            }
            false => None,
        };
        // The processor of ConvNeXT and ResNet: below 384 a larger picture is made and its middle taken.
        if let (Resize::Shorter(side), Some(part)) = (resize, json.get("crop_pct").and_then(Value::as_f64))
            && crop.is_none()
        {
            (resize, crop) = match side < 384 {
                true => (Resize::Shorter((side as f64 / part) as usize), Some([side, side])),
                false => (Resize::To([side, side]), None),
            };
        }
        let size = match (crop, resize) {
            (Some(size), _) | (None, Resize::To(size)) => size,
            (None, Resize::Keep) => default,
            (None, Resize::Shorter(_)) => return Err("images keep their proportions and so differ in size".to_owned()),
        };
        let normalised = flag("do_normalize", true);
        let channel = |key: &str, absent: f32, off: f32| match normalised {
            true => numbers(json, key, channels, absent),
            false => Ok(vec![off; channels]),
        };
        let factor = json.get("rescale_factor").and_then(Value::as_f64).unwrap_or(1.0 / 255.0);
        Ok(Self {
            channels,
            resize,
            filter: filter(json.get("resample"))?,
            crop,
            rescale: if flag("do_rescale", true) { factor as f32 } else { 1.0 },
            mean: channel("image_mean", 0.5, 0.0)?,
            std: channel("image_std", 0.5, 1.0)?,
            size,
        })
    }

    /// Height and width of every prepared image.
    pub fn size(&self) -> [usize; 2] {
        self.size
    }

    /// The prepared pixels of a file, `[channels, height, width]`, perhaps mirrored.
    ///
    /// # Errors
    /// The file cannot be read or decoded, or has another size where images are not resized.
    pub fn pixels(&self, path: &Path, mirror: bool) -> Result<Vec<f32>, DataError> {
        let picture = self.prepared(decode(path, self.channels)?);
        let [height, width] = self.size;
        if [picture.height, picture.width] != self.size {
            let reason = format!("is {} x {}, expected {height} x {width}", picture.height, picture.width);
            return Err(bad_file(path, reason, "set do_resize in preprocessor_config.json"));
        }
        let picture = if mirror { picture.mirrored() } else { picture };
        let mut pixels = Vec::with_capacity(picture.bytes.len());
        for channel in 0..self.channels {
            let (mean, std) = (self.mean[channel], self.std[channel]);
            let bytes = picture.bytes.iter().skip(channel).step_by(self.channels);
            pixels.extend(bytes.map(|&byte| (f32::from(byte) * self.rescale - mean) / std));
        }
        Ok(pixels)
    }

    fn prepared(&self, picture: Picture) -> Picture {
        let resized = match self.resize {
            Resize::To([height, width]) => picture.resized(height, width, self.filter),
            Resize::Shorter(side) => {
                let shorter = picture.height.min(picture.width);
                let scaled = |length: usize| if length == shorter { side } else { (side * length / shorter).max(1) };
                picture.resized(scaled(picture.height), scaled(picture.width), self.filter)
            }
            Resize::Keep => picture,
        };
        match self.crop {
            Some([height, width]) => resized.center_cropped(height, width),
            None => resized,
        }
    }
}

fn decode(path: &Path, channels: usize) -> Result<Picture, DataError> {
    let io = |source| DataError::Io { path: path.to_path_buf(), source };
    let reader = ImageReader::open(path).map_err(io)?.with_guessed_format().map_err(io)?;
    let decoded = reader.decode().map_err(|error| {
        let hint = "the file may be damaged, or be no PNG or JPEG: repair it or take it out of the folder";
        bad_file(path, format!("not a readable image: {error}"), hint)
    })?;
    let (width, height) = (decoded.width() as usize, decoded.height() as usize);
    if width == 0 || height == 0 {
        return Err(bad_file(path, "the image has no pixels", "take it out of the folder"));
    }
    let bytes = match channels {
        1 => decoded.into_luma8().into_raw(),
        _ => decoded.into_rgb8().into_raw(),
    };
    Ok(Picture { height, width, channels, bytes })
}

fn resize(size: Option<&Value>, default: [usize; 2]) -> Result<Resize, String> {
    let expected = "`size`: expected a number, height and width, or shortest_edge";
    match size {
        None | Some(Value::Null) => Ok(Resize::To(default)),
        Some(size) => match (sides(Some(size)), number(size.get("shortest_edge"))) {
            (Some(Some(sides)), _) => Ok(Resize::To(sides)),
            (_, Some(side)) => Ok(Resize::Shorter(side)),
            _ => Err(format!("{expected}, got {size}")),
        },
    }
}

fn number(value: Option<&Value>) -> Option<usize> {
    value.and_then(Value::as_u64).filter(|&side| (1..=1 << 16).contains(&side)).map(|side| side as usize)
}

/// Height and width; `Some(None)` where nothing is given, `None` where it is something else.
fn sides(value: Option<&Value>) -> Option<Option<[usize; 2]>> {
    match value {
        None | Some(Value::Null) => Some(None),
        Some(Value::Object(map)) => Some(Some([number(map.get("height"))?, number(map.get("width"))?])),
        side => number(side).map(|side| Some([side, side])),
    }
}

fn filter(value: Option<&Value>) -> Result<Filter, String> {
    match value.map(|value| value.as_u64()) {
        None | Some(Some(2)) => Ok(Filter::Bilinear),
        Some(Some(3)) => Ok(Filter::Bicubic),
        Some(Some(0)) => Ok(Filter::Nearest),
        _ => Err(format!(
            "`resample`: expected 0 (nearest), 2 (bilinear) or 3 (bicubic), got {}",
            value.unwrap_or(&Value::Null)
        )),
    }
}

/// One number for each channel, a list of one standing for all.
fn numbers(json: &Value, key: &str, channels: usize, absent: f32) -> Result<Vec<f32>, String> {
    let expected = |got: &Value| format!("`{key}`: expected {channels} numbers other than 0, got {got}");
    match json.get(key) {
        None | Some(Value::Null) => Ok(vec![absent; channels]),
        Some(value) => {
            let list = match value {
                Value::Array(list) => list.as_slice(),
                one => std::slice::from_ref(one),
            };
            let read: Option<Vec<f32>> = list.iter().map(|value| value.as_f64().map(|value| value as f32)).collect();
            match read {
                Some(all) if all.len() == channels && !(key == "image_std" && all.contains(&0.0)) => Ok(all),
                Some(one) if one.len() == 1 && !(key == "image_std" && one[0] == 0.0) => Ok(vec![one[0]; channels]),
                _ => Err(expected(value)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use serde_json::json;

    fn rules(json: Value, channels: usize, size: Option<[usize; 2]>) -> Result<ImageRules, String> {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("preprocessor_config.json"), json.to_string()).unwrap();
        ImageRules::read(folder.path(), channels, size).map_err(|error| error.to_string())
    }

    #[test]
    fn the_forms_of_the_file() {
        let vit =
            json!({"size": {"height": 8, "width": 4}, "image_mean": [0.1, 0.2, 0.3], "image_std": 0.5, "resample": 3});
        let vit = rules(vit, 3, Some([8, 4])).unwrap();
        assert_eq!((vit.resize, vit.filter, vit.size()), (Resize::To([8, 4]), Filter::Bicubic, [8, 4]));
        assert_eq!((vit.mean.as_slice(), vit.std.as_slice()), (&[0.1, 0.2, 0.3][..], &[0.5; 3][..]));
        let resnet = rules(json!({"size": {"shortest_edge": 224}, "crop_pct": 0.875}), 3, None).unwrap();
        assert_eq!((resnet.resize, resnet.crop), (Resize::Shorter(256), Some([224, 224])));
        let crop = json!({"size": 32, "do_center_crop": true, "crop_size": {"height": 28, "width": 28}, "do_normalize": false});
        let crop = rules(crop, 1, None).unwrap();
        assert_eq!((crop.size(), crop.mean[0], crop.std[0]), ([28, 28], 0.0, 1.0));
        let absent = ImageRules::read(Path::new("nowhere"), 3, Some([16, 16])).unwrap();
        assert_eq!((absent.size(), absent.mean[0], absent.std[0]), ([16, 16], 0.5, 0.5));
    }

    #[test]
    fn wrong_files_are_named() {
        let error = rules(json!({"size": 20}), 3, Some([16, 16])).unwrap_err();
        assert!(error.contains("makes images of [20, 20] (height, width), but the model takes [16, 16]"), "{error}");
        let error = rules(json!({"size": {"longest_edge": 20}}), 3, None).unwrap_err();
        assert!(error.contains("`size`: expected a number"), "{error}");
        let error = rules(json!({"image_std": [0.5, 0.0, 0.5]}), 3, None).unwrap_err();
        assert!(error.contains("`image_std`: expected 3 numbers other than 0"), "{error}");
        assert!(rules(json!({"resample": 9}), 3, None).unwrap_err().contains("`resample`"));
        assert!(rules(json!({"size": {"shortest_edge": 8}}), 3, None).unwrap_err().contains("differ in size"));
    }

    #[test]
    fn pixels_are_channels_of_rows() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.png");
        let bytes: Vec<u8> = (0..2 * 3 * 3).map(|i| i * 10).collect();
        image::save_buffer(&path, &bytes, 3, 2, image::ColorType::Rgb8).unwrap();
        let rules = rules(json!({"size": {"height": 2, "width": 3}}), 3, None).unwrap();
        let pixels = rules.pixels(&path, false).unwrap();
        let expected = |byte: u8| (f32::from(byte) / 255.0 - 0.5) / 0.5;
        let green = [10, 40, 70, 100, 130, 160].map(expected);
        assert!(pixels[6..12].iter().zip(green).all(|(got, wanted)| (got - wanted).abs() < 1e-6), "{pixels:?}");
        let mirrored = rules.pixels(&path, true).unwrap();
        assert_eq!((mirrored[6], mirrored[8], mirrored[9]), (pixels[8], pixels[6], pixels[11]));
        std::fs::write(&path, b"\x89PNG\r\n\x1a\nshort").unwrap();
        let error = rules.pixels(&path, false).unwrap_err().to_string();
        assert!(error.contains("a.png: not a readable image"), "{error}");
    }
}
