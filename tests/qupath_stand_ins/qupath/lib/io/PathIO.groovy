package qupath.lib.io

import groovy.json.JsonSlurper

class PathIO {
    static class PathObject {
        String pathClass
        double scale = 1
    }

    static List<PathObject> readObjectsFromGeoJSON(InputStream stream) {
        def found = new JsonSlurper().parse(new InputStreamReader(stream, "UTF-8"))
        found.features.collect { new PathObject(pathClass: it.properties.classification.name) }
    }
}
