package qupath.lib.objects

import java.awt.geom.AffineTransform

class PathObjectTools {
    static Object transformObject(Object object, AffineTransform transform, boolean copyMeasurements) {
        object.getClass().newInstance(pathClass: object.pathClass, scale: transform.getScaleX())
    }
}
