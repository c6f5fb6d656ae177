//! What the tests are given.

use std::path::PathBuf;

/// Paths from the environment.
#[derive(Clone, Debug)]
pub struct Env {
    /// The program.
    pub binary: PathBuf,
    /// Directory of built images, `tiny/manifest.json` and so on.
    pub images: PathBuf,
    /// Directory of recipes.
    pub recipes: PathBuf,
}

impl Env {
    /// `None`, with the reason printed, when the tests cannot run here.
    #[must_use]
    pub fn find() -> Option<Self> {
        match Self::look() {
            Ok(env) => Some(env),
            Err(reason) => {
                println!("skipped: {reason}");
                None
            }
        }
    }

    fn look() -> Result<Self, String> {
        if !nix::unistd::geteuid().is_root() {
            return Err("needs root".into());
        }
        let path = |name: &str| {
            let value = std::env::var_os(name).ok_or_else(|| format!("{name} is not set"))?;
            let path = PathBuf::from(value);
            if path.exists() { Ok(path) } else { Err(format!("{name}: there is no {}", path.display())) }
        };
        let found = Self {
            binary: path("OBLAK_TEST_BINARY")?,
            images: path("OBLAK_TEST_IMAGES")?,
            recipes: path("OBLAK_RECIPES")?,
        };
        for image in ["tiny", "busybox"] {
            if !found.images.join(image).join("manifest.json").exists() {
                return Err(format!("OBLAK_TEST_IMAGES has no image {image}"));
            }
        }
        Ok(found)
    }
}
