package qupath.lib.projects

import qupath.lib.images.ImageData

class Projects {
    static class Entry {
        String imageName

        ImageData readImageData() { new ImageData() }
        void saveImageData(ImageData data) {
            println "saved ${imageName}: ${data.imageType}, ${data.objects.size()} of ${data.objects*.scale.unique()}"
        }
    }

    static class Project {
        Entry addImage(Object builder) { new Entry() }
        void syncChanges() { println "synchronised" }
    }

    static Project createProject(File folder, Class type) { new Project() }
}
