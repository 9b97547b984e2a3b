//! Files and directories that only their owner may read: the embedded database, the key beside it, and mails.

use std::{fs, io, path::Path};

/// Creates a directory, and those above it, if they do not exist.
pub fn create_directory(path: &Path) -> io::Result<()> {
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(path)
}

/// The options to open a file for writing. If it is created, only its owner can read it.
pub fn options() -> fs::OpenOptions {
    let mut options = fs::OpenOptions::new();
    options.write(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options
}

/// Takes the rights of other users away from a file, if it exists and belongs to the user of this process. Fails if other
/// users have rights to a file that belongs to somebody else.
#[cfg(unix)]
pub fn keep_private(path: &Path) -> io::Result<()> {
    use std::{
        fs::Permissions,
        os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    };

    let file = match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        file => file?,
    };
    let rights_of_others = file.mode() & 0o077;
    if rights_of_others == 0 {
        return Ok(());
    }
    if file.uid() != rustix::process::geteuid().as_raw() {
        let told =
            format!("other users have rights to {}, and it belongs to one of them: chmod 600 it", path.display());
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, told));
    }
    fs::set_permissions(path, Permissions::from_mode(file.mode() & 0o700))?;
    tracing::warn!(file = %path.display(), "other users had rights to this file, which were taken away");
    Ok(())
}

#[cfg(not(unix))]
pub fn keep_private(_path: &Path) -> io::Result<()> {
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(unix)]
    #[test]
    fn the_rights_of_others_are_taken_away() {
        use std::{fs::Permissions, os::unix::fs::PermissionsExt as _};

        let directory = tempfile::tempdir().expect("a directory");
        let file = directory.path().join("file");
        keep_private(&file).expect("there is none");
        fs::write(&file, "secret").expect("a file");
        for (before, after) in [(0o644, 0o600), (0o660, 0o600), (0o400, 0o400), (0o600, 0o600)] {
            fs::set_permissions(&file, Permissions::from_mode(before)).expect("our file");
            keep_private(&file).expect("our file");
            assert_eq!(fs::metadata(&file).expect("a file").permissions().mode() & 0o777, after, "{before:o}");
        }
    }
}
