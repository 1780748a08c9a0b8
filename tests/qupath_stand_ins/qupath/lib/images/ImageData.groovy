package qupath.lib.images

class ImageData {
    enum ImageType { BRIGHTFIELD_H_E, BRIGHTFIELD_H_DAB }

    ImageType imageType
    List objects = []

    ImageData getHierarchy() { this }
    boolean addObjects(Collection added) { objects.addAll(added) }
}
