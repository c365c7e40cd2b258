import com.alibaba.fastjson2.JSON;
import java.io.FileDescriptor;
import java.io.FileOutputStream;
import java.io.PrintStream;
import java.nio.charset.StandardCharsets;
import java.sql.Connection;
import java.sql.DriverManager;
import java.sql.PreparedStatement;
import java.sql.SQLException;
import java.util.Base64;
import java.util.LinkedHashMap;
import java.util.Map;
import org.apache.rocketmq.client.consumer.DefaultMQPushConsumer;
import org.apache.rocketmq.client.consumer.listener.ConsumeConcurrentlyStatus;
import org.apache.rocketmq.client.consumer.listener.MessageListenerConcurrently;
import org.apache.rocketmq.common.consumer.ConsumeFromWhere;
import org.apache.rocketmq.common.message.MessageExt;

/**
 * Consumes with Apache's own client until it is killed, and prints each message as a line of JSON, once it is done.
 *
 * java -cp 'LIB/*' Consumer.java NAME_SERVER GROUP TOPIC,TOPIC [DATABASE CLAIM]
 *
 * With a database it does as docs/how-to/java-listeners.md says: CLAIM, which takes the key, and the effect behind it, in one
 * transaction.
 */
public class Consumer {
    private static final PrintStream OUT =
            new PrintStream(new FileOutputStream(FileDescriptor.out), true, StandardCharsets.UTF_8);

    public static void main(String[] given) throws Exception {
        var consumer = new DefaultMQPushConsumer(given[1]);
        consumer.setNamesrvAddr(given[0]);
        consumer.setMqClientApiTimeout(60_000); // a busy machine takes long for the first one
        consumer.setConsumeFromWhere(ConsumeFromWhere.CONSUME_FROM_FIRST_OFFSET);
        for (var topic : given[2].split(",")) consumer.subscribe(topic, "*");
        consumer.registerMessageListener((MessageListenerConcurrently) (messages, context) -> {
            try {
                for (var message : messages) {
                    Boolean claimed = given.length > 3 ? effect(given[3], given[4], message.getKeys()) : null;
                    OUT.println(JSON.toJSONString(told(message, claimed)));
                }
                return ConsumeConcurrentlyStatus.CONSUME_SUCCESS;
            } catch (Exception error) {
                error.printStackTrace();
                return ConsumeConcurrentlyStatus.RECONSUME_LATER;
            }
        });
        consumer.start();
    }

    /** Says whether the message was this listener's to do. */
    private static boolean effect(String database, String claim, String key) throws SQLException {
        try (Connection connection = DriverManager.getConnection(database)) {
            connection.setAutoCommit(false);
            PreparedStatement claiming = connection.prepareStatement(claim);
            claiming.setString(1, key);
            if (claiming.executeUpdate() == 0) {
                connection.rollback();
                return false;
            }
            PreparedStatement writing = connection.prepareStatement("INSERT INTO effect VALUES (?, 'java')");
            writing.setString(1, key);
            writing.executeUpdate();
            connection.commit();
            return true;
        }
    }

    private static Map<String, Object> told(MessageExt message, Boolean claimed) {
        var told = new LinkedHashMap<String, Object>();
        told.put("id", message.getMsgId());
        told.put("topic", message.getTopic());
        told.put("tags", message.getTags());
        told.put("keys", message.getKeys());
        told.put("body", Base64.getEncoder().encodeToString(message.getBody()));
        told.put("properties", message.getProperties());
        told.put("queue", message.getQueueId());
        told.put("born", message.getBornTimestamp());
        told.put("heard", System.currentTimeMillis());
        told.put("again", message.getReconsumeTimes());
        told.put("claimed", claimed);
        return told;
    }
}
