//! What the driver remembers of a volume, on disk beside it.

use std::path::{Path, PathBuf};

use oblak_model::{Size, VolumeId};
use oblak_platform::driver::{DriverError, DriverResult};
use oblak_platform::fsx;
use oblak_volume::Format;
use serde::{Deserialize, Serialize};

/// Name of the record in the volume's directory.
const FILE: &str = "volume.json";

/// One volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The volume.
    pub id: VolumeId,
    /// Format, fixed.
    pub format: Format,
    /// Size the guest sees, or will see once its driver has grown the disk.
    pub size: Size,
    /// Its content.
    pub path: PathBuf,
    /// The image it is an overlay of: path and format. Nothing else may be its backing file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backing: Option<(PathBuf, Format)>,
    /// Who owns the content.
    pub owner: (u32, u32),
    /// False while the content is being made; what there is then is worthless.
    pub ready: bool,
}

impl Record {
    /// The record in the volume's directory.
    pub fn read(home: &Path) -> DriverResult<Option<Self>> {
        let path = home.join(FILE);
        fsx::read_json(&path).map_err(|e| match e.kind() {
            std::io::ErrorKind::InvalidData => {
                DriverError::permanent("record_damaged", format!("the record of a volume is damaged: {e}"))
            }
            _ => DriverError::io(&path.display().to_string(), &e),
        })
    }

    /// Writes it durably.
    pub fn write(&self, home: &Path) -> DriverResult<()> {
        fsx::write_json(&home.join(FILE), self)
            .map_err(|e| DriverError::io(&format!("volume {}: writing its record", self.id), &e))
    }

    /// Forgets it; what is left is no volume any more.
    pub fn delete(home: &Path) -> DriverResult<()> {
        let gone = fsx::remove_file_if_exists(&home.join(FILE)).and_then(|()| fsx::sync_dir(home));
        gone.map_err(|e| DriverError::io(&home.display().to_string(), &e))
    }
}
