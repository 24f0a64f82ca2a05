//! Logits and activations measured on independent implementations, with the model files they belong to.

use crate::npy::{Array, NpyError, parse_npy};
use ds4_gguf::Gguf;
use std::borrow::Cow;
use std::path::{Path, PathBuf};

/// Where a fixture's files are.
enum Source {
    Folder(PathBuf),
    /// Name and content.
    Embedded(&'static [(&'static str, &'static [u8])]),
}

/// The files of a fixture.
pub struct Fixture(Source);

/// `dev-f16`, so that a program can prove itself on the machine it runs on. Only a binary that uses it has
/// these 3 MB in it.
static DEV_F16: &[(&str, &[u8])] = {
    macro_rules! files {
        ($($name:literal)*) => {
            &[$(($name, include_bytes!(concat!("../fixtures/logits/dev-f16/", $name)))),*]
        };
    }
    files! {
        "model.gguf" "mtp.gguf" "tokens.npy" "logit_positions.npy" "logits.npy" "logits_qat.npy"
        "probe_positions.npy" "streams.npy" "attn_out.npy" "ffn_out.npy" "router_ids.npy" "indexer_rows.json"
        "mtp_positions.npy" "mtp_logits.npy"
    }
};

impl Fixture {
    /// A fixture that ships with the project's sources.
    pub fn shipped(name: &str) -> Self {
        Fixture::at(&Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/logits").join(name))
    }

    /// A fixture elsewhere.
    pub fn at(dir: &Path) -> Self {
        Fixture(Source::Folder(dir.into()))
    }

    /// The fixture inside the program.
    pub fn embedded() -> Self {
        Fixture(Source::Embedded(DEV_F16))
    }

    /// The path of a file of the fixture; its bare name if the fixture is embedded.
    pub fn path(&self, name: &str) -> PathBuf {
        match &self.0 {
            Source::Folder(dir) => dir.join(name),
            Source::Embedded(_) => name.into(),
        }
    }

    fn embedded_file(&self, name: &str) -> Option<&'static [u8]> {
        match &self.0 {
            Source::Folder(_) => None,
            Source::Embedded(files) => files.iter().find(|(n, _)| *n == name).map(|(_, bytes)| *bytes),
        }
    }

    fn bytes(&self, name: &str) -> Result<Cow<'static, [u8]>, NpyError> {
        match self.embedded_file(name) {
            Some(bytes) => Ok(bytes.into()),
            None => {
                let path = self.path(name);
                std::fs::read(&path).map(Cow::Owned).map_err(|source| NpyError::Io { path, source })
            }
        }
    }

    /// The model.
    pub fn model(&self) -> Result<Gguf, ds4_gguf::Error> {
        self.gguf("model.gguf")
    }

    /// The draft block, where the fixture has one.
    pub fn draft(&self) -> Result<Option<Gguf>, ds4_gguf::Error> {
        let name = "mtp.gguf";
        let exists = self.embedded_file(name).is_some() || self.path(name).exists();
        exists.then(|| self.gguf(name)).transpose()
    }

    fn gguf(&self, name: &str) -> Result<Gguf, ds4_gguf::Error> {
        match self.embedded_file(name) {
            Some(bytes) => Gguf::from_static(bytes),
            None => Gguf::open(self.path(name)),
        }
    }

    /// An array of the fixture.
    pub fn array(&self, name: &str) -> Result<Array, NpyError> {
        let name = format!("{name}.npy");
        parse_npy(&self.path(&name), &*self.bytes(&name)?)
    }

    /// The input tokens.
    pub fn tokens(&self) -> Result<Vec<u32>, NpyError> {
        Ok(self.array("tokens")?.values.iter().map(|&v| v as u32).collect())
    }

    /// Compressed rows attended to: layer, position, rows.
    pub fn indexer_rows(&self) -> Result<Vec<(usize, usize, Vec<usize>)>, NpyError> {
        let name = "indexer_rows.json";
        let format = |message: String| NpyError::Format { path: self.path(name), message };
        type ByLayer = std::collections::BTreeMap<String, std::collections::BTreeMap<String, Vec<usize>>>;
        let layers: ByLayer =
            serde_json::from_slice(&self.bytes(name)?).map_err(|e| format(e.to_string()))?;
        let number = |s: &str| s.parse::<usize>().map_err(|e| format(e.to_string()));
        let mut all = Vec::new();
        for (layer, positions) in layers {
            for (position, rows) in positions {
                all.push((number(&layer)?, number(&position)?, rows));
            }
        }
        Ok(all)
    }
}
