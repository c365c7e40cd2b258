import java.nio.charset.StandardCharsets;
import org.apache.rocketmq.client.producer.LocalTransactionState;
import org.apache.rocketmq.client.producer.TransactionListener;
import org.apache.rocketmq.client.producer.TransactionMQProducer;
import org.apache.rocketmq.client.producer.selector.SelectMessageQueueByHash;
import org.apache.rocketmq.common.message.Message;
import org.apache.rocketmq.common.message.MessageConst;
import org.apache.rocketmq.common.message.MessageExt;

/** Sends one ordered message, and one in a transaction. Arguments: name server, topic, and topic of type TRANSACTION or none. */
public class Sends {
    public static void main(String[] arguments) throws Exception {
        TransactionMQProducer producer = new TransactionMQProducer("java-sends");
        producer.setNamesrvAddr(arguments[0]);
        producer.setTransactionListener(new TransactionListener() {
            public LocalTransactionState executeLocalTransaction(Message message, Object argument) {
                return LocalTransactionState.COMMIT_MESSAGE;
            }

            public LocalTransactionState checkLocalTransaction(MessageExt message) {
                return LocalTransactionState.COMMIT_MESSAGE;
            }
        });
        producer.start();
        Message ordered = message(arguments[1]);
        ordered.getProperties().put(MessageConst.PROPERTY_SHARDING_KEY, "A");
        producer.send(ordered, new SelectMessageQueueByHash(), "A");
        if (arguments.length > 2) {
            producer.sendMessageInTransaction(message(arguments[2]), null);
        }
        producer.shutdown();
        System.exit(0);
    }

    private static Message message(String topic) {
        Message message = new Message(topic, "paid", "K-1", "{}".getBytes(StandardCharsets.UTF_8));
        message.putUserProperty("city", "K\u00f6ln");
        message.getProperties().put("blank", " ");
        message.getProperties().put("empty", "");
        return message;
    }
}
